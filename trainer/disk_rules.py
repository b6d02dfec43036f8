"""Rules for the keys of ``checkpoint.disk``; the other rules are in ``trainer.recipe_checks``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from checkpointing.remote import LocationError
from checkpointing.storage import place_of

if TYPE_CHECKING:
    from trainer.recipe_view import Finding, View


def _permanent(view: View) -> Iterator[Finding]:
    every, permanent = view("checkpoint.disk.every"), view("checkpoint.disk.permanent_every")
    if permanent and not every:
        yield (
            "checkpoint.disk.permanent_every",
            (
                f"checkpoint.disk.permanent_every={permanent} keeps some of the checkpoints that disk.every writes, "
                "and that is 0; set checkpoint.disk.every"
            ),
        )
    elif permanent and permanent % every:
        yield (
            "checkpoint.disk.permanent_every",
            (
                f"checkpoint.disk.permanent_every={permanent} is not a multiple of checkpoint.disk.every={every}; "
                f"choose e.g. {-(-permanent // every) * every}"
            ),
        )


def _url(view: View) -> Iterator[Finding]:
    url = view("checkpoint.disk.url")
    if url is None:
        return
    if "\0" in url:
        yield "checkpoint.disk.url", "checkpoint.disk.url holds a zero character; write a folder or a URL"
        return
    if "memory" in (link.partition("://")[0] for link in url.split("::")):
        yield "checkpoint.disk.url", f"checkpoint.disk.url={url!r} ends with its process; choose a folder or a store"
        return
    try:
        place_of(url)
    except LocationError as error:
        yield "checkpoint.disk.url", f"checkpoint.disk.url: {error}"


DISK_RULES: tuple[Callable[[View], Iterator[Finding]], ...] = (_permanent, _url)
