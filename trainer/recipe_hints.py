"""What the writer of an unknown key most likely meant."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from trainer.schema import KEYS, NAMED, children, schema_path
from trainer.yaml_lines import Path, dotted

# Names that other trainers give these keys, too unlike ours for a spelling match.
_ELSEWHERE = {
    "learning_rate": "train.lr",
    "max_steps": "train.steps",
    "num_steps": "train.steps",
    "epochs": "train.steps",
    "num_train_epochs": "train.steps",
    "batch_size": "train.global_batch_size",
    "per_device_train_batch_size": "train.micro_batch_size",
    "num_gpus": "parallel.workers",
    "world_size": "parallel.workers",
    "nproc_per_node": "parallel.workers",
    "expert_parallel": "parallel.ep",
    "zero_stage": "parallel.zero",
    "precision": "parallel.dtype",
    "bf16": "parallel.dtype",
    "max_length": "data.sequence_length",
    "seq_len": "data.sequence_length",
    "block_size": "data.sequence_length",
    "dataset": "data.source",
    "save_steps": "checkpoint.disk.every",
    "save_total_limit": "checkpoint.disk.keep_last",
    "output_dir": "log.dir",
    "logging_steps": "log.every",
    "eval_steps": "train.eval_every",
    "gradient_clipping": "train.max_grad_norm",
    "router_jitter_noise": "routing.jitter",
    "jitter_eps": "routing.jitter",
    "scoring_func": "routing.score",
    "moe_expert_capacity_factor": "routing.capacity_factor",
    "drop_policy": "routing.drop_by",
    "aux_loss_alpha": "balance.aux_loss_coef",
    "moe_aux_loss_coeff": "balance.aux_loss_coef",
    "router_z_loss_coef": "balance.z_loss_coef",
    "moe_z_loss_coeff": "balance.z_loss_coef",
    "load_balance_coeff": "balance.bias_update_rate",
    "rank": "adapter.*.r",
    "lora_r": "adapter.*.r",
    "lora_alpha": "adapter.*.alpha",
    "target_modules": "adapter.*.targets",
    "lora": "adapter",
    "num_local_experts": "model.num_experts",
    "n_routed_experts": "model.num_experts",
    "top_k": "model.num_experts_per_tok",
    "model_type": "model.family",
}


def unknown_key(path: Path) -> str:
    """The whole message for a key that the schema does not have."""
    parent, found = schema_path(path)[:-1], meant(path)
    message = f"unknown key {dotted(path)}"
    if not found:
        known = ", ".join(children(parent))
        return f"{message}; {dotted(path[:-1]) or 'a recipe'} has the keys {known}"
    message += f"; did you mean {' or '.join(_written(path, other) for other in found)}?"
    other = found[0][:-1]
    if other != parent and all(path[:-1] == other for path in found):
        where = f"under {_written(path, other)!r}" if other else "at the top level"
        message += f" (that key lives {where})"
    return message


def meant(path: Path) -> list[tuple[str, ...]]:
    """Schema paths that the unknown ``path`` most likely stands for, best first."""
    parent, name = schema_path(path)[:-1], str(path[-1])
    plain = name.lower().replace("-", "_")
    here = {p[-1]: p for p in KEYS if p[:-1] == parent}
    if plain in here:
        return [here[plain]]
    # Tenants repeat other sections' keys, and only who writes about tenants means theirs.
    known = [p for p in KEYS if p[0] != "tenants" or len(p) == 1 or parent[:1] == ("tenants",)]
    if exact := [p for p in known if p[-1] == plain]:
        return _nearest(exact, parent)
    if plain in _ELSEWHERE:
        return [tuple(_ELSEWHERE[plain].split("."))]
    if close := difflib.get_close_matches(plain, here, n=1, cutoff=0.7):
        return [here[close[0]]]
    anywhere = difflib.get_close_matches(plain, {p[-1] for p in known}, n=1, cutoff=0.75)
    return _nearest([p for p in known if anywhere and p[-1] == anywhere[0]], parent)


def _nearest(paths: list[tuple[str, ...]], parent: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Those of ``paths`` that share most leading sections with ``parent``, at most three."""

    def shared(path: tuple[str, ...]) -> int:
        return sum(1 for i in range(1, len(parent) + 1) if path[:i] == parent[:i])

    best = max(map(shared, paths), default=0)
    return [p for p in paths if shared(p) == best][:3]


def _written(path: Path, names: tuple[str, ...]) -> str:
    """``names`` with the adapter bank that the user was writing, or ``<bank>``."""
    bank = str(path[1]) if path[:1] in NAMED and len(path) > 2 else "<bank>"
    return ".".join(bank if part == "*" else part for part in names)


def word_hint(value: Any, choices: Sequence[str]) -> str:
    """``, did you mean 'cosine'?`` for a misspelt choice, else nothing."""
    close = difflib.get_close_matches(str(value).lower(), choices, n=1) if isinstance(value, str) else []
    return f"; did you mean {close[0]!r}?" if close else ""
