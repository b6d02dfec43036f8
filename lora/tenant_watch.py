"""Proof that every tenant's adapters train, as :mod:`lora.watch` has it for a single one.

Which of an expert's rows were whose is not seen from outside, so a stacked B is judged as a whole: each tenant has
tokens in every layer, and some expert took them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora.errors import AdapterError
from lora.tenants import parameters_of


@dataclass
class _Seen:
    path: str
    tenant: str
    moved: Tensor

    def record(self, grad: Tensor) -> None:
        self.moved |= (grad != 0).any()


class TenantWatch:
    """Raises if a tenant's B got no gradient on any rank in the first step; after that its hooks are gone."""

    def __init__(self, model: nn.Module, tenants: list[str]) -> None:
        self._seen, self._hooks = [], []
        for tenant in tenants:
            for path, parameter in parameters_of(model, tenant):
                if path.endswith(".B"):
                    seen = _Seen(path, tenant, torch.zeros((), dtype=torch.bool, device=parameter.device))
                    self._seen.append(seen)
                    self._hooks.append(parameter.register_hook(seen.record))

    def check(self, present: set[str], reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """After the backward passes of a step in which the tenants ``present`` took part. Collective.

        Args:
            reduce: returns the sum of a tensor over all ranks of the job, of which each has a share of every tenant's
                tokens; None on a single rank.

        Raises AdapterError, on every rank alike.
        """
        if not self._seen:
            return
        flags = torch.stack([seen.moved for seen in self._seen]).float()
        moved = ((reduce(flags) if reduce else flags) > 0).tolist()
        dead = [s for s, did in zip(self._seen, moved, strict=True) if s.tenant in present and not did]
        for hook in self._hooks:
            hook.remove()
        self._seen, self._hooks = [], []
        if dead:
            raise AdapterError(
                f"no gradient reached {dead[0].path} of tenant {dead[0].tenant}, and {len(dead) - 1} others, although "
                "its tokens passed through there: the adapter is cut off from the model's output"
            )
