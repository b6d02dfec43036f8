"""Rules for the keys of ``data`` that format chat has, and for what it cannot be combined with.

The other rules are in ``trainer.recipe_checks``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora.config import BankConfig
from trainer.schema import DataSection, Recipe

if TYPE_CHECKING:
    from trainer.recipe_view import Finding, View

CHAT_KEYS = ("chat_template", "answers", "packing", "overlong", "task_key")
CHAT_TEMPLATES = ("model", "plain")  # all other values are files
_BY_SEQUENCE = ("expert_loss_coef", "device_loss_coef", "communication_loss_coef")


def resolved_chat(data: DataSection, folder: Path) -> DataSection:
    """Defaults of format chat written out; ``folder`` is the recipe's."""
    template = data.chat_template or "model"
    return dataclasses.replace(
        data,
        chat_template=template if template in CHAT_TEMPLATES else str(folder / template),
        answers=data.answers or "all",
        packing=data.packing is not False,
        overlong=data.overlong or "truncate",
    )


def task_need(bank: BankConfig) -> str:
    """What follows an expanded bank's name in a sentence if it needs tasks and the data names none; else nothing."""
    remedy = "and the data names none; write data.format: chat and data.task_key"
    if bank.router == "task":
        return f" routes by task, {remedy}"
    if bank.balance == "localized_cv2" and bank.router_aux_loss_coef:
        return f".balance=localized_cv2 evens out experts by task, {remedy}, or router_aux_loss_coef: 0"
    return ""


def task_problem(recipe: Recipe, tasks: Sequence[str]) -> str:
    """What is wrong if an adapter needs tasks that the data does not name, or not as many; else nothing."""
    for name, bank in recipe.adapter.items():
        need = task_need(bank)
        if need and not tasks:
            return f"adapter.{name}{need}"
        if bank.router == "task" and bank.num_tasks != len(tasks):
            return (
                f"adapter.{name}.num_tasks={bank.num_tasks}, and the data has {len(tasks)} tasks "
                f"({', '.join(tasks[:10])}{', ...' if len(tasks) > 10 else ''}); write num_tasks: {len(tasks)}"
            )
    return ""


def _chat_keys(view: View) -> Iterator[Finding]:
    if view("data.format") == "chat":
        return
    for name in CHAT_KEYS:
        if view.given(f"data.{name}"):
            yield f"data.{name}", f"data.{name} belongs to format: chat; remove it or change data.format"


def _chat_tokens(view: View) -> Iterator[Finding]:
    if view("data.format") != "chat":
        return
    kind = view("data.tokenizer.kind")
    if kind == "bpe":
        yield (
            "data.tokenizer.kind",
            "tokenizer kind 'bpe' is trained on text files, which format: chat has not; use kind model, or bytes for a "
            "new model",
        )
    elif kind == "bytes" and view("data.chat_template") in (None, "model"):
        yield (
            "data.tokenizer.kind",
            "tokenizer kind 'bytes' has no chat template of its own; write data.chat_template: plain, or a file",
        )


def _chat_loss(view: View) -> Iterator[Finding]:
    """What sees over the borders of samples, or averages over other tokens than those with loss."""
    if view("data.format") != "chat":
        return
    if view("train.mtp.depth"):
        yield (
            "train.mtp.depth",
            "multi-token prediction would predict across the borders of chat samples; set train.mtp.depth: 0",
        )
    if view("model.soft.kind") != "none":
        yield (
            "model.soft.kind",
            f"model.soft.kind={view('model.soft.kind')} mixes all tokens of a row, so chat samples would leak into "
            "each other; use a model that routes, or format: jsonl",
        )


def _packed_balance(view: View) -> Iterator[Finding]:
    if view("data.format") != "chat" or view("data.packing") is False:
        return
    found = [f"balance.{name}" for name in _BY_SEQUENCE if view(f"balance.{name}")]
    if view("balance.aux_loss") == "sequence":
        found.append("balance.aux_loss")
    for key in found:
        yield (
            key,
            f"{key}={view(key)} balances each sequence, and with data.packing a sequence holds several samples; set "
            "data.packing: false, or choose balance.aux_loss: micro_batch or global_batch",
        )


DATA_RULES: tuple[Callable[[View], Iterator[Finding]], ...] = (_chat_keys, _chat_tokens, _chat_loss, _packed_balance)
