"""Writing the folders of :mod:`checkpointing.deepspeed_format`, so that DeepSpeed's ``load_checkpoint`` reads them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpointing.deepspeed_format import EXPERT_PREFIX, MODEL_STATES, expert_file, optimizer_file


@dataclass(frozen=True)
class ModelFacts:
    """What a folder says of a run besides tensors. ``shapes`` are local ones, per parameter group."""

    step: int
    samples: int
    world: int
    zero: int
    bf16: bool
    clip_grad: float
    version: str
    shapes: Sequence[Mapping[str, tuple[int, ...]]]


def write_model(
    tag_dir: Path,
    facts: ModelFacts,
    weights: Mapping[str, Tensor],
    experts: Mapping[str, int],
    shared: Mapping[str, str],
    expert_parallel: bool,
    buffers: Mapping[str, Tensor],
) -> None:
    """Weights, whole, by path; ``experts`` has each stacked tensor's layer, ``shared`` the path that one is tied to.

    Without expert parallelism DeepSpeed keeps stacked experts among the other weights.
    """
    layers = sorted(set(experts.values())) if expert_parallel else []
    module = {path: w for path, w in weights.items() if not (expert_parallel and path in experts)}
    module |= {path: weights[kept] for path, kept in shared.items()}
    module |= buffers
    counts = []
    for number, layer in enumerate(layers):
        stacked = {path: weights[path] for path, at in experts.items() if at == layer}
        count = next(iter(stacked.values())).shape[0]
        counts.append(count)
        for e in range(count):
            names = {_expert_key(path, e): tensor[e].clone() for path, tensor in stacked.items()}
            torch.save(names, tag_dir / expert_file(number, e))
    states: dict[str, Any] = {
        "module": OrderedDict(module),
        "buffer_names": list(buffers),
        "optimizer": None,
        "param_shapes": [
            OrderedDict((name, torch.Size(shape)) for name, shape in group.items()) for group in facts.shapes
        ],
        "frozen_param_shapes": None,
        "shared_params": dict(shared),
        "frozen_param_fragments": None,
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": 0,
        "global_steps": facts.step,
        "global_samples": facts.samples,
        "dp_world_size": facts.world,
        "mp_world_size": 1,
        "ds_config": {},
        "ds_version": facts.version,
        **({"num_experts": counts, "ds_autoep_layers": None} if expert_parallel else {}),
    }
    torch.save(states, tag_dir / MODEL_STATES)


def _expert_key(path: str, expert: int) -> str:
    parent, _, tensor = path.rpartition(".")
    return f"{parent}.{EXPERT_PREFIX}{expert}.{tensor}"


def write_rank(
    tag_dir: Path,
    rank: int,
    facts: ModelFacts,
    optimizer: torch.optim.Optimizer,
    fragments: Sequence[Mapping[str, tuple[int, int]]],
    partition_counts: Sequence[int],
    fragment_class: type,
) -> None:
    """A rank's optimizer states.

    Args:
        optimizer: over the rank's flat partitions, its state in place.
        fragments: for each group (start, elements) of each parameter's part in the partition.
        fragment_class: DeepSpeed's, made from ``numel`` and ``start``.
    """
    masters = [group["params"][0].detach() for group in optimizer.param_groups]
    used = [max((start + size for start, size in group.values()), default=0) for group in fragments]
    states: dict[str, Any] = {
        "dynamic_loss_scale": False,
        "overflow": False,
        "clip_grad": facts.clip_grad,
        "base_optimizer_state": optimizer.state_dict(),
        "single_partition_of_fp32_groups": [flat[:n].clone() for flat, n in zip(masters, used, strict=True)],
        "zero_stage": facts.zero,
        "group_paddings": [flat.numel() - n for flat, n in zip(masters, used, strict=True)],
        "param_alignment_paddings": [[0] * len(group) for group in facts.shapes],
        "partition_count": list(partition_counts),
        "ds_version": facts.version,
        "param_slice_mappings": [
            OrderedDict((name, fragment_class(numel=size, start=start)) for name, (start, size) in group.items())
            for group in fragments
        ],
    }
    wrapped = {"optimizer_state_dict": states, "ds_config": {}, "ds_version": facts.version}
    torch.save(wrapped, tag_dir / optimizer_file(rank, facts.bf16))
