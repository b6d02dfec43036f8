"""Names of experts and tensors that do not depend on ranks.

Every parameter carries a :class:`TensorAddress`. It splits the parameter's flattened elements into
*units*, the atoms of checkpointing and export: one unit per (layer, global expert, tensor) for
stacked expert weights, one unit per parameter for everything else.

>>> str(ExpertRef(3, 17))
'L03.E017'
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod

_REF = re.compile(r"L(\d{2,})\.E(\d{3,})")


@dataclass(frozen=True, order=True)
class ExpertRef:
    """One routed expert, by global layer index and global expert index."""

    layer: int
    expert: int

    def __str__(self) -> str:
        return f"L{self.layer:02d}.E{self.expert:03d}"

    @classmethod
    def parse(cls, text: str) -> ExpertRef:
        """Inverse of ``str``. Raises ValueError for anything else."""
        match = _REF.fullmatch(text)
        if match is None:
            raise ValueError(f"not an expert reference: {text!r} (expected the form L03.E017)")
        return cls(int(match[1]), int(match[2]))


@dataclass(frozen=True)
class UnitSpan:
    """Elements ``[start:stop)`` of a flattened local tensor, and the unit they make up."""

    unit: str
    start: int
    stop: int


@dataclass(frozen=True)
class TensorAddress:
    """Where a local parameter tensor lies in the global model.

    Attributes:
        param: path of the parameter in the whole model, e.g. ``model.layers.3.mlp.experts.down_proj``.
        shape: the *local* shape; for stacked experts the first axis counts local experts.
        layer: global layer index, for stacked expert tensors.
        tensor: name of the tensor inside its expert, e.g. ``down_proj``.
        first_expert: global index of local expert 0.
        num_experts: global number of experts; 0 for tensors that are not stacked by expert.
    """

    param: str
    shape: tuple[int, ...]
    layer: int = -1
    tensor: str = ""
    first_expert: int = 0
    num_experts: int = 0

    @property
    def is_expert(self) -> bool:
        return self.num_experts > 0

    @property
    def global_shape(self) -> tuple[int, ...]:
        return (self.num_experts, *self.shape[1:]) if self.is_expert else self.shape

    def units(self) -> tuple[UnitSpan, ...]:
        """The units this tensor consists of, in memory order."""
        if not self.is_expert:
            return (UnitSpan(self.param, 0, prod(self.shape)),)
        size = prod(self.shape[1:])
        return tuple(
            UnitSpan(f"{ExpertRef(self.layer, self.first_expert + i)}.{self.tensor}", i * size, (i + 1) * size)
            for i in range(self.shape[0])
        )
