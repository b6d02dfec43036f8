"""DeepSpeed around a converted model: parameter groups, the inner optimizer, the ZeRO configuration."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

# Must precede the first import of deepspeed, which otherwise goes looking for accelerators and says so.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.moe.utils import is_moe_param, split_params_into_different_moe_groups_for_optimizer
from deepspeed.ops import __compatible_ops__
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero import stage_1_and_2
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils.tensor_fragment import fragment_address

from checkpointing.state.optimizers import Lion
from lora.tenants import parameters_of
from moe.deepspeed_ep import bind_expert_parallel
from moe.experts import Experts
from trainer.clipping import NormClip
from trainer.schema import Recipe, TrainSection

DEEPSPEED_VERSION = deepspeed.__version__
FRAGMENT_CLASS = fragment_address
CHECKPOINT_CLASSES = (fragment_address, LossScaler, ZeroStageEnum)  # what its checkpoints pickle besides tensors


def prepare_deepspeed() -> None:
    """Adopt the existing process group, without DeepSpeed's just-in-time build.

    On CPU DeepSpeed would compile a shared-memory all-reduce at its first start, behind a lock file that a killed
    worker leaves behind; all later starts then hang. gloo does the same work.
    """
    deepspeed_logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), dist_init_required=False)


def preload() -> None:
    """Import what DeepSpeed would import in ``initialize``: over a second, which a worker then need not spend."""
    with contextlib.suppress(ImportError):  # another version keeps it elsewhere, and then imports it late
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """What trains, split into decayed matrices, undecayed vectors, and expert-parallel parameters."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"name": "matrices", "params": [p for p in trained if _is_matrix(p)], "weight_decay": weight_decay},
        {"name": "vectors", "params": [p for p in trained if not _is_matrix(p)], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if any(is_moe_param(p) for p in trained):
        groups = split_params_into_different_moe_groups_for_optimizer(groups)
    return [group for group in groups if group["params"]]


def tenant_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """One group for each of the recipe's tenants, in their order, with its own learning rate and weight decay."""
    return [
        {
            "name": name,
            "params": [parameter for _, parameter in parameters_of(model, name)],
            "lr": tenant.lr,
            "weight_decay": tenant.weight_decay,
        }
        for name, tenant in recipe.tenants.items()
    ]


def _is_matrix(parameter: nn.Parameter) -> bool:
    """Stacked experts' biases are one vector for each expert."""
    stacked = getattr(parameter, "address", None) is not None and parameter.address.is_expert
    return parameter.dim() > (2 if stacked else 1)


def deepspeed_config(recipe: Recipe, dtype: torch.dtype, accumulation: int) -> dict[str, Any]:
    train = recipe.train
    return {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0 if recipe.tenants else train.max_grad_norm,  # tenants are clipped one by one
        # The loop asks whether the norm is a number before a state can be captured. DeepSpeed would ask every gradient,
        # in a third of all kernels of a step.
        "bf16": {"enabled": dtype == torch.bfloat16, "check_grad_overflow": False},
        "zero_optimization": {
            "stage": recipe.parallel.zero,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "overlap_comm": False,
        },
        # It has tested few classes. Ours update element by element, so flat partitions are no other than parameters.
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        # It would wait for the whole device before each forward pass, and so for captures on their side stream.
        "timers": {"throughput": {"enabled": False}},
    }


class _Participants:
    """How many parameters take part in the backward pass under way, for DeepSpeed, which asks in each.

    Its own function looks every parameter's node up anew, before the pass's other work: a millisecond or two for a
    hundred parameters. A node stays the parameter's for as long as somebody holds it.
    """

    def __init__(self) -> None:
        self._parameters: Sequence[torch.Tensor] = ()
        self._nodes: list[Any] = []

    def __call__(self, parameters: Sequence[torch.Tensor]) -> int:
        if parameters is not self._parameters:
            edges = [torch.autograd.graph.get_gradient_edge(p) for p in parameters if p.requires_grad]
            self._parameters, self._nodes = parameters, list({edge.node for edge in edges})
        return sum(map(torch._C._will_engine_execute_node, self._nodes))


def create_engine(model: nn.Module, recipe: Recipe, dtype: torch.dtype, accumulation: int) -> deepspeed.DeepSpeedEngine:
    """DeepSpeed engine with the recipe's optimizer on ZeRO's flat partitions.

    Adapters must be attached already: whether experts train decides how DeepSpeed is to see them.
    """
    train = recipe.train
    for module in model.modules():
        if isinstance(module, Experts):
            bind_expert_parallel(module)
    groups = tenant_groups(model, recipe) if recipe.tenants else parameter_groups(model, train.weight_decay)
    optimizer = create_optimizer(groups, train)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=deepspeed_config(recipe, dtype, accumulation), dist_init_required=False
    )
    NormClip(engine)
    stage_1_and_2.count_used_parameters_in_backward = _Participants()
    if torch.distributed.get_world_size() == 1:
        # Nothing is to be averaged, yet DeepSpeed would copy each gradient into a bucket, divide it by 1, copy it back.
        engine.optimizer.reduce_ready_partitions_and_remove_grads = lambda parameter, group: None
    return engine


def create_optimizer(groups: list[dict[str, Any]], train: TrainSection) -> torch.optim.Optimizer:
    """The optimizer of a resolved recipe: torch's fused ones, and our Lion."""
    if train.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=train.lr, momentum=train.momentum, fused=True)
    betas = (train.beta1, train.beta2)
    if train.optimizer == "lion":
        return Lion(groups, lr=train.lr, betas=betas)
    return torch.optim.AdamW(groups, lr=train.lr, betas=betas, eps=train.eps, fused=True)


def set_learning_rate(engine: deepspeed.DeepSpeedEngine, lr: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
