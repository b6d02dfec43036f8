"""What DeepSpeed (0.19) needs to see to run our experts expert-parallel.

DeepSpeed recognises expert parallelism by three things: a module that is an instance of its own ``MoE`` class,
parameters with ``allreduce=False`` and a ``group_name``, and a method that creates the process groups. Our experts get
all three when they train; when every expert parameter is frozen they must *not* be instances of ``MoE``, because ZeRO
then insists on an expert parameter group and finds none.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups

from moe.experts import Experts


class _ExpertParallel(Experts):
    """Experts spread over the ranks of ``ep_size_N``. Frozen ones stay of this class."""

    @property
    def expert_group_name(self) -> str:
        return f"ep_size_{self.ep_size}"

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Called by ``deepspeed.initialize``; creates the groups on the first call in the process."""
        name = self.expert_group_name
        if name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(
                self.ep_size, use_data_before_expert_parallel_=use_data_before_expert_parallel_
            )
        self.ep_group = groups._get_expert_parallel_group(name)


EXPERT_PREFIX = "deepspeed_moe.experts.deepspeed_experts."


class _TrainedExpertParallel(_ExpertParallel, MoE):
    """Experts (or adapters on them) that train. DeepSpeed's own constructor and forward are never used.

    In a state dict each expert has its own keys, under the names by which DeepSpeed's ``save_checkpoint`` and
    ``load_checkpoint`` tell experts apart; names of ours would make it fail.
    """

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, stacked_L in self._parameters.items():
            if stacked_L is None:
                continue
            for i in range(self.num_local_experts):
                expert = stacked_L[i]
                destination[f"{prefix}{EXPERT_PREFIX}{i}.{name}"] = expert if keep_vars else expert.detach()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in self._parameters:
            keys = [f"{prefix}{EXPERT_PREFIX}{i}.{name}" for i in range(self.num_local_experts)]
            if all(key in state_dict for key in keys):
                state_dict[prefix + name] = torch.stack([state_dict.pop(key) for key in keys])
        super()._load_from_state_dict(state_dict, prefix, *rest)


def bind_expert_parallel(experts: Experts) -> None:
    """Make ``experts`` expert-parallel for DeepSpeed, in place; call after adapters are attached. No-op for ep = 1."""
    if experts.ep_size == 1:
        return
    mine = [p for p in experts.parameters() if getattr(p, "address", None) is not None and p.address.is_expert]
    # Factors that an adapter shares among all experts are here, too, but train as ordinary parameters.
    trains = any(p.requires_grad for p in mine)
    # Changing the class keeps every reference to the module, its parameters and hooks valid.
    experts.__class__ = _TrainedExpertParallel if trains else _ExpertParallel
    for parameter in mine:
        parameter.allreduce = False
        parameter.group_name = f"ep_size_{experts.ep_size}"
