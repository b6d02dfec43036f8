"""Rules that tie several keys of a recipe together.

Each rule reads the values through a :class:`~trainer.recipe_view.View`; the rules of ``checkpoint`` are in
``trainer.checkpoint_checks``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from moe.family_table import FAMILIES
from trainer.bank_rules import BANK_RULES
from trainer.checkpoint_checks import CHECKPOINT_RULES
from trainer.data_rules import DATA_RULES
from trainer.disk_rules import DISK_RULES
from trainer.family_checks import FAMILY_RULES
from trainer.optimizer_rules import OPTIMIZER_RULES
from trainer.recipe_view import Finding, Unknown, View
from trainer.routing_rules import ROUTING_RULES
from trainer.schema import KEYS
from trainer.tenant_recipe import tenant_findings
from trainer.variant_checks import VARIANT_RULES
from trainer.yaml_lines import Path

WITH_PATH = (
    "path",
    "attention_dropout",
    "router_aux_loss_coef",
    "experts_backend",
    "frozen_experts",
    "trainable_experts",
    "soft",
)
WITHOUT_SHARED_EXPERT = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss")
BYTE_VOCABULARY = 257  # 256 bytes and <|endoftext|>


def findings(values: dict[str, Any], bad: set[Path]) -> Iterator[Finding]:
    """Every broken rule among the values; ``bad`` are the paths already reported."""
    view = View(values, bad)
    for rule in _RULES:
        # A rule may find several things before it meets a value that it cannot know.
        try:
            yield from rule(view)
        except Unknown:
            continue
    yield from tenant_findings(view)
    banks = values.get("adapter")
    for name in banks if isinstance(banks, dict) else ():
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
            yield ("adapter", name), f"adapter bank {name!r}: use letters, digits, '_' and '-', a letter first"
            continue
        for bank_rule in BANK_RULES:
            try:
                yield from bank_rule(view, f"adapter.{name}")
            except Unknown:
                continue


def _model_origin(view: View) -> Iterator[Finding]:
    has_family, has_path = view.given("model.family"), view.given("model.path")
    if has_family and has_path:
        yield "model.path", "model has both 'family' and 'path'; keep one (a new model, or a folder)"
    elif has_path:
        for name in view("model"):
            if name not in WITH_PATH and ("model", name) in KEYS:
                yield (
                    f"model.{name}",
                    (f"model.{name} contradicts model.path, whose config.json says the shape; remove it"),
                )
    elif (
        not has_family
        and isinstance(view.values.get("model"), dict)
        and not (view.reported("model.family") or view.reported("model.path"))
    ):
        yield (
            "model",
            (
                "model has neither 'family' nor 'path'; add 'family: qwen3_moe' and a shape, "
                "or 'path: FOLDER' of a Hugging Face model"
            ),
        )


def _heads(view: View) -> Iterator[Finding]:
    heads, kv_heads = view("model.num_attention_heads"), view("model.num_key_value_heads")
    if heads and kv_heads and heads % kv_heads:
        yield (
            "model.num_key_value_heads",
            (
                f"model.num_key_value_heads={kv_heads} does not divide model.num_attention_heads={heads}; "
                "choose a divisor"
            ),
        )


def _head_dim(view: View) -> Iterator[Finding]:
    heads, hidden, head_dim = (
        view("model.num_attention_heads"),
        view("model.hidden_size"),
        view("model.head_dim"),
    )
    family = FAMILIES.get(view("model.family"))
    if not heads or not hidden or (family is not None and family.latent_attention):
        return
    if head_dim is None and hidden % heads:
        other = "" if family is not None and family.lacks("head_dim") else " or give model.head_dim"
        yield (
            "model.hidden_size",
            f"model.num_attention_heads={heads} does not divide model.hidden_size={hidden}; choose a multiple{other}",
        )
    elif (head_dim or hidden // heads) % 2:
        yield (
            "model.head_dim",
            (
                f"the head dimension is {head_dim or hidden // heads}, but rotary positions pair it up; "
                "give an even model.head_dim"
            ),
        )


def _model_top_k(view: View) -> Iterator[Finding]:
    top_k, experts = view("model.num_experts_per_tok"), view("model.num_experts")
    if experts and top_k > experts:
        yield (
            "model.num_experts_per_tok",
            (f"model.num_experts_per_tok={top_k} is more than model.num_experts={experts}; choose at most that"),
        )


def _positions(view: View) -> Iterator[Finding]:
    length, most = view("data.sequence_length"), view("model.max_position_embeddings")
    if not view.given("model.path") and length > most:
        yield (
            "data.sequence_length",
            (
                f"data.sequence_length={length} is more than model.max_position_embeddings={most}; lower the one "
                "or raise the other"
            ),
        )


def _text_key(view: View) -> Iterator[Finding]:
    if view("data.format") != "jsonl" and view.given("data.text_key"):
        yield "data.text_key", "data.text_key belongs to format: jsonl; remove it or change data.format"


def _stdlib(view: View) -> Iterator[Finding]:
    if view("data.source") != "stdlib":
        return
    if view("data.format") != "text":
        yield (
            "data.format",
            f"source: stdlib is Python text, not {view('data.format')}; write format: text or source: files",
        )
    for i, pattern in enumerate(view("data.include")):
        if pattern.startswith("/") or ".." in pattern.split("/"):
            yield f"data.include.{i}", (f"pattern {pattern!r} leaves the standard library; use source: files for it")


def _tokenizer_origin(view: View) -> Iterator[Finding]:
    kind = view("data.tokenizer.kind")
    if view.given("model.path") and view.given("model.family"):
        return
    if kind == "model" and not view.given("model.path"):
        yield "data.tokenizer.kind", "tokenizer kind 'model' needs model.path; use bpe or bytes for a new model"
    if kind != "model" and view.given("model.path"):
        yield (
            "data.tokenizer.kind",
            (f"a model from model.path has its own tokens, kind {kind!r} would give others; write kind: model"),
        )


def _vocabulary(view: View) -> Iterator[Finding]:
    kind, size = view("data.tokenizer.kind"), view("data.tokenizer.vocab_size")
    given = view.given("data.tokenizer.vocab_size")
    if kind == "bpe" and not given:
        yield (
            "data.tokenizer.vocab_size",
            ("missing key data.tokenizer.vocab_size; kind bpe needs it, e.g. 'vocab_size: 2048'"),
        )
    elif kind == "bpe" and size < BYTE_VOCABULARY:
        yield (
            "data.tokenizer.vocab_size",
            (f"data.tokenizer.vocab_size={size} is too small; bpe starts from {BYTE_VOCABULARY} tokens"),
        )
    elif kind == "bytes" and given and size != BYTE_VOCABULARY:
        yield "data.tokenizer.vocab_size", f"kind bytes has {BYTE_VOCABULARY} tokens, not {size}; remove the key"
    elif kind == "model" and given and size:
        yield "data.tokenizer.vocab_size", "kind model takes the folder's own vocabulary; remove the key"


def _ep_workers(view: View) -> Iterator[Finding]:
    ep, workers = view("parallel.ep"), view("parallel.workers")
    if workers % ep:
        yield (
            "parallel.ep",
            (f"parallel.ep={ep} does not divide parallel.workers={workers}; choose a divisor of {workers}"),
        )


def _ep_experts(view: View) -> Iterator[Finding]:
    ep, experts = view("parallel.ep"), view("model.num_experts")
    if experts % ep:
        yield (
            "parallel.ep",
            (
                f"parallel.ep={ep} does not divide model.num_experts={experts}: every worker of a group holds "
                f"equally many experts; choose a divisor of {experts}"
            ),
        )


def _exchange(view: View) -> Iterator[Finding]:
    ep, overlap = view("parallel.ep"), view("parallel.overlap")
    for key, nothing in (("parallel.dispatch", "auto"), ("parallel.overlap", "none")):
        if ep == 1 and view(key) != nothing:
            yield key, f"{key}={view(key)} does nothing with parallel.ep=1, where no token travels; remove the key"
    if ep > 1 and overlap == "shared" and view.given("model.family") and view("model.family") in WITHOUT_SHARED_EXPERT:
        yield (
            "parallel.overlap",
            f"parallel.overlap=shared, but {view('model.family')} has no shared expert; remove the key",
        )


def _zero(view: View) -> Iterator[Finding]:
    zero, ep = view("parallel.zero"), view("parallel.ep")
    if zero in (1, 2):
        return
    if zero == 0 and ep > 1:
        why = f"ZeRO-0 with ep={ep} clips by a norm that misses the other workers' experts"
    elif zero == 3 and ep > 1:
        why = f"ZeRO-3 with ep={ep} is refused by DeepSpeed: it would partition experts that differ by worker"
    elif zero in (0, 3):
        why = f"ZeRO-{zero} has no optimizer partitions to capture and restore"
    else:
        why = f"there is no ZeRO-{zero}"
    yield "parallel.zero", f"parallel.zero={zero}: {why}; choose 1 or 2"


def _batch(view: View) -> Iterator[Finding]:
    batch, micro = view("train.global_batch_size"), view("train.micro_batch_size")
    workers = view("parallel.workers")
    if batch % (workers * micro):
        yield (
            "train.global_batch_size",
            (
                f"train.global_batch_size={batch} is not a multiple of parallel.workers={workers} x "
                f"train.micro_batch_size={micro}; choose a multiple of {workers * micro}"
            ),
        )


def _warmup(view: View) -> Iterator[Finding]:
    warmup, steps = view("train.warmup_steps"), view("train.steps")
    if warmup >= steps:
        yield "train.warmup_steps", (f"train.warmup_steps={warmup} leaves nothing of train.steps={steps}; choose fewer")


def _run_name(view: View) -> Iterator[Finding]:
    run = view("log.run")
    if run and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", run):
        yield (
            "log.run",
            (
                f"log.run={run!r} names a folder: use letters, digits, '.', '_' and '-'; "
                "put the parent folder in log.dir"
            ),
        )


_RULES: tuple[Callable[[View], Iterator[Finding]], ...] = (
    _model_origin,
    *FAMILY_RULES,
    _heads,
    _head_dim,
    _model_top_k,
    _positions,
    _text_key,
    _stdlib,
    _tokenizer_origin,
    _vocabulary,
    _ep_workers,
    _ep_experts,
    _exchange,
    _zero,
    _batch,
    _warmup,
    _run_name,
    *CHECKPOINT_RULES,
    *DISK_RULES,
    *DATA_RULES,
    *OPTIMIZER_RULES,
    *ROUTING_RULES,
    *VARIANT_RULES,
)
