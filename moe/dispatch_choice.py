"""Which way tokens go to experts on other ranks, and why. No torch here: plans ask as well."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chosen:
    """A dispatcher's name as recipes have it and, for the user, why."""

    name: str
    reason: str


def choose_dispatch(wanted: str, top_k: int, ep: int) -> Chosen:
    """``wanted`` is ``all_to_all``, ``deduplicated``, or ``auto`` for whichever sends less."""
    if ep == 1:
        return Chosen("local", "every worker has all experts")
    if wanted != "auto":
        return Chosen(wanted, "the recipe says so")
    if top_k == 1:
        return Chosen("all_to_all", "a token has one expert, so there is nothing to send twice")
    return Chosen("deduplicated", f"several of a token's {top_k} experts may be on one worker, which gets one copy")
