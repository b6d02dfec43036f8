"""Extend and freeze (MoE-LPR, Zhou et al. 2024): new experts learn, the old ones keep every bit.

:func:`extend` writes a folder with more experts in every layer; :func:`freeze_experts` has the first ones of a model,
and all that is neither expert nor router, not train. Frozen and trained experts are separate Parameters, joined for
each forward pass: the frozen ones are no part of the optimizer's flat partitions, so neither weight decay nor rounding
reaches them, and their gradient is never kept.

A new expert is a copy of an old one. Its row of the router is by default the mean of the old rows: its logit is then
the mean of the old logits, which is among the K largest only where nearly all old ones are below the mean. Where it is
not, and chosen weights are renormalised, the extended model computes what the old one did.

Shapes: E experts (E0 old ones), K chosen, H hidden.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AutoConfig, PreTrainedConfig

from moe.experts import Experts
from moe.families import MoEBlock
from moe.folder import copy_companions, new_folder, read_tensors, write_tensors
from moe.upcycle import drawn

ROUTER_NOISE = 0.01  # of new rows, relative to the old ones' deviation: equal rows would always be chosen together

_EXPERT = re.compile(r"(.*\.experts\.)(\d+)(\..+)")
_ROUTER = re.compile(r".*\.(gate|router)\.(weight|bias|e_score_correction_bias)")
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
_STACKED = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
_STACK = re.compile(rf".*\.experts\.({'|'.join(_STACKED)})")


class ExtendError(ValueError):
    """Experts cannot be added or frozen as asked; the message says why and what to do."""


@dataclass(frozen=True)
class Extension:
    """What to add. Raises ExtendError for numbers that make no sense.

    Attributes:
        experts: how many in every layer; expert E0+j is a copy of expert j mod E0.
        noise: standard deviation of what is added to each copied tensor, relative to its own.
        router: what new rows are: ``mean`` of the old ones, or a ``copy`` of the copied expert's row, which then shares
            its tokens.
        seed: of the noise.
    """

    experts: int
    noise: float = 0.01
    router: Literal["mean", "copy"] = "mean"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.experts < 1:
            raise ExtendError(f"experts={self.experts}: at least one must be added")
        if not 0 <= self.noise < math.inf:
            raise ExtendError(f"noise={self.noise} is a standard deviation; give a number, 0 or more")


def extend(folder: str | Path, out: str | Path, what: Extension) -> int:
    """Write the extended model to ``out``, one tensor at a time; returns E0, the number of old experts.

    Raises ExtendError for a model that cannot be extended so, FolderError if ``out`` exists.
    """
    folder, out = Path(folder), Path(out)
    if not (folder / "config.json").is_file():
        raise ExtendError(f"{folder} has no config.json; give a Hugging Face folder of a mixture of experts")
    config = AutoConfig.from_pretrained(folder)
    name, old = _count_of(config, folder)
    if getattr(config, "n_group", None) not in (None, 1):
        raise ExtendError(
            f"{folder}: this {config.model_type} routes by n_group={config.n_group} groups of {old // config.n_group} "
            "neighbouring experts, and with more experts other ones would be neighbours; extend a model without groups"
        )
    with new_folder(out) as temporary:
        write_tensors(_extended(read_tensors(folder), old, what), temporary)
        setattr(config, name, old + what.experts)
        config.save_pretrained(temporary)
        copy_companions(folder, temporary)
    return old


def _count_of(config: PreTrainedConfig, folder: Path) -> tuple[str, int]:
    for name in _COUNTS:
        if isinstance(getattr(config, name, None), int):
            return name, getattr(config, name)
    raise ExtendError(f"{folder} names no {' or '.join(_COUNTS)}; use a mixture of experts, or planaria upcycle first")


def _extended(tensors: Iterable[tuple[str, Tensor]], old: int, what: Extension) -> Iterator[tuple[str, Tensor]]:
    experts = routers = 0
    for name, tensor in tensors:
        match = _EXPERT.fullmatch(name)
        if _ROUTER.fullmatch(name) and tensor.shape[0] == old:
            routers += 1
            yield name, _more_rows(tensor, name, what)
            continue
        if _STACK.fullmatch(name) and tensor.shape[0] == old:
            experts += 1
            copies = [_noisy(tensor[j % old], what.noise, what.seed, f"{name}.{old + j}") for j in range(what.experts)]
            yield name, torch.cat([tensor, torch.stack(copies)])
            continue
        yield name, tensor
        if match is not None:
            experts += 1
            for copy in range(int(match[2]), what.experts, old):
                new = f"{match[1]}{old + copy}{match[3]}"
                yield new, _noisy(tensor, what.noise, what.seed, new)
    if not experts or not routers:
        raise ExtendError(
            "looked for tensors like model.layers.0.mlp.experts.0.up_proj.weight or model.layers.0.mlp.experts."
            f"gate_up_proj, and a router of {old} rows, found {experts} and {routers}; give a folder of a family that "
            "planaria trains"
        )


def _more_rows(rows_E: Tensor, name: str, what: Extension) -> Tensor:
    """The router's rows (or its bias), and those of the new experts."""
    rows = rows_E.float()
    if what.router == "copy":
        added = rows[torch.arange(what.experts) % len(rows)]
    else:
        added = rows.mean(0, keepdim=True).expand(what.experts, *rows.shape[1:])
    if rows.dim() > 1:
        added = added + drawn(added.shape, ROUTER_NOISE * float(rows.std()), what.seed, name)
    return torch.cat([rows_E, added.to(rows_E.dtype)])


def _noisy(tensor: Tensor, noise: float, seed: int, name: str) -> Tensor:
    if not noise:
        return tensor
    return (tensor.float() + drawn(tensor.shape, noise * float(tensor.float().std()), seed, name)).to(tensor.dtype)


# -- training ----------------------------------------------------------------------------------------------------------


class _WithFrozen(nn.Module):
    """Stands between a stacked tensor's trained part and its users, who see frozen and trained experts together."""

    def __init__(self, frozen_E: Tensor) -> None:
        super().__init__()
        self.register_buffer("frozen", frozen_E)

    def forward(self, trained_E: Tensor) -> Tensor:
        frozen: Any = self.frozen
        return torch.cat([frozen, trained_E])


def freeze_experts(model: nn.Module, blocks: list[MoEBlock], frozen: int) -> None:
    """Have only the routers train, and of each layer's experts those from number ``frozen`` on.

    Call it after conversion, with all experts on one rank. Raises ExtendError if there are fewer experts.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for block in blocks:
        experts = block.experts
        assert isinstance(experts, Experts), "convert the model first"
        assert experts.ep_size == 1, "frozen experts would lie on some ranks only"
        if not 1 <= frozen <= experts.num_experts:
            raise ExtendError(
                f"model.frozen_experts={frozen}: {block.path} has {experts.num_experts} experts; choose at most that"
            )
        for parameter in block.gate.parameters():
            parameter.requires_grad_(True)
        if frozen < experts.num_experts:
            _split(experts, frozen)


def _split(experts: Experts, frozen: int) -> None:
    for name in _STACKED:
        whole = getattr(experts, name, None)
        if whole is None:
            continue
        address = whole.address
        setattr(experts, name, nn.Parameter(whole.detach()[frozen:].clone()))
        # The shape changes, which torch calls unsafe.
        parametrize.register_parametrization(experts, name, _WithFrozen(whole.detach()[:frozen].clone()), unsafe=True)
        trained = experts.parametrizations[name].original
        trained.address = replace(address, shape=tuple(trained.shape), first_expert=frozen)
    experts.forward = _joined_once(experts.forward)  # type: ignore[method-assign]


def _joined_once(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Join the parts once for each pass, not for each look at them."""

    def run(*arguments: Any, **named: Any) -> Tensor:
        with parametrize.cached():
            return forward(*arguments, **named)

    return run
