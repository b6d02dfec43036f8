"""What test_ranks.py trains with one process and with two ranks: banks by the name of the case.

Each case is a model of its own in the one launch of two ranks. Targets must not overlap within a case; losses get a
coefficient and dropout is off, so that one process can be compared with two ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora.config import BankConfig
from moe.context import BatchContext

_MIXED = {"num_experts": 4, "r": 2, "alpha": 4.0, "dropout": 0.0, "router_aux_loss_coef": 0.1}
CUT_OFF = "experts and mola"  # the case whose ranks also have to notice an adapter that is cut off

CASES: dict[str, dict[str, BankConfig]] = {
    CUT_OFF: {
        "e": BankConfig("expert-lora", r=4, alpha=8.0),
        "a": BankConfig("mola", r=2, alpha=4.0, num_experts=(2, 4), router_aux_loss_coef=0.1),
    },
    "experts": {"e": BankConfig("expert-lora", r=3, alpha=8.0)},
    "experts, shared": {"e": BankConfig("expert-lora-shared", r=3, alpha=8.0)},
    "experts, shared outer": {"e": BankConfig("expert-lora-shared-outer", r=3, alpha=8.0)},
    # Experts that are spread over the ranks and frozen: DeepSpeed must not take them for ones that train.
    "attention only": {
        "lora": BankConfig("lora", targets=("q_proj",), r=2),
        "mola": BankConfig("mola", targets=("v_proj",), r=2, alpha=4.0),
    },
    "linear, one expert or all": {
        "lora": BankConfig("lora", targets=("q_proj",), r=2),
        "rslora": BankConfig("rslora", targets=("k_proj",), r=2),
        "moslora": BankConfig("moslora", targets=("v_proj",), r=2),
        "mov": BankConfig("mov", targets=("o_proj",), num_experts=3),
    },
    "linear, soft": {
        "molora": BankConfig("molora", targets=("q_proj",), num_experts=3, r=2),
        "loramoe": BankConfig("loramoe", targets=("k_proj",), num_experts=4, r=2, alpha=4.0, router_aux_loss_coef=0.1),
        "hydralora": BankConfig("hydralora", targets=("v_proj",), r=2, alpha=4.0),
        "moelora-task": BankConfig(
            "moelora-task", targets=("o_proj",), r=8, num_experts=4, dropout=0.0, num_tasks=2, task_embedding=5
        ),
    },
    "linear, chosen": {
        "moelora": BankConfig(
            "moelora", targets=("q_proj",), num_experts=4, r=2, router_aux_loss_coef=0.1, contrastive_coef=0.05
        ),
        "adamole": BankConfig("adamole", targets=("k_proj",), r=2, router_aux_loss_coef=0.1),
        "mola": BankConfig(
            "mola", targets=("v_proj",), r=2, balance_pooled=True, router_aux_loss_coef=0.1, z_loss_coef=0.01
        ),
    },
    "linear, trained adapters": {
        "mole": BankConfig("mole", targets=("q_proj",), adapters=("a", "b", "c"), r=2),
        "mola": BankConfig("mola", targets=("v_proj",), adapters=("a", "b", "c"), r=2, router_aux_loss_coef=0.1),
        "arrow": BankConfig("arrow", targets=("o_proj",), adapters=("a", "b", "c"), r=2, top_k=2),
    },
    "linear, weighed by states": {
        "experts": BankConfig("expert-lora", r=3, alpha=8.0),
        "trained": BankConfig("x-lora", targets=("q_proj",), adapters=("a", "b", "c"), r=2),
        "new": BankConfig(
            "x-lora",
            targets=("v_proj",),
            num_experts=3,
            r=2,
            combine="top_k",
            balance="switch",
            router_aux_loss_coef=0.1,
        ),
    },
    "linear, chosen by prompt": {
        "milora": BankConfig("milora", ("self_attn.*_proj",), r=2, alpha=4.0, top_k=2, router_aux_loss_coef=0.1),
    },
    "beside MoE blocks, following their router": {"perft-e": BankConfig("perft-e", r=2)},
    "beside MoE blocks, own router": {
        "perft-r": BankConfig(
            "perft-r", r=2, num_experts=4, top_k=2, balance="switch", router_aux_loss_coef=0.1, z_loss_coef=0.01
        ),
    },
    "beside MoE blocks, all": {"perft-d": BankConfig("perft-d", r=2, num_experts=2)},
    "beside MoE blocks, one": {"perft-s": BankConfig("perft-s", r=2)},
    "dense, mixlora": {"mixlora": BankConfig("mixlora", **_MIXED)},
    "dense, mixlora-dynamic": {"mixlora-dynamic": BankConfig("mixlora-dynamic", **_MIXED)},
    "dense, mixlora-switch": {"mixlora-switch": BankConfig("mixlora-switch", jitter=0.0, **_MIXED)},
}

# Losses of a batch's routing depend on how it is shared out, so these cases have none.
_ON_FOUR = (
    "experts",
    "experts, shared",
    "experts, shared outer",
    "attention only",
    "beside MoE blocks, following their router",
)
# By number of ranks: what is trained there, and over how many ranks the experts are spread.
PLANS: dict[int, list[tuple[str, int]]] = {
    2: [(case, 2) for case in CASES],
    4: [(case, ep) for case in _ON_FOUR for ep in (4, 2)],
}


def is_dense(case: str) -> bool:
    """Whether the case's base is the dense one."""
    return case.startswith("dense")


def context_of(tokens_BT: Tensor, aux_scale: float = 1.0) -> BatchContext:
    """The batch's rows are samples, of task 0 and 1 by turns; each begins with a prompt."""
    rows, length = tokens_BT.shape
    prompt_T = (torch.arange(length) < length // 2).repeat(rows)
    task_T = (torch.arange(rows) % 2).repeat_interleave(length)
    return BatchContext(aux_scale=aux_scale, shape=(rows, length), task_T=task_T, prompt_T=prompt_T)


def file_of(case: str, world: int = 2, ep: int = 2) -> str:
    """The case's name, and where it is trained, as part of a file's."""
    return f"{case.replace(' ', '-').replace(',', '')}-{world}-{ep}"
