"""Which rank holds which experts.

Expert-parallel groups are contiguous ranks, expert-data-parallel groups are strided, as DeepSpeed
builds them: with 4 ranks and ep=2 the EP groups are (0, 1) and (2, 3), the EDP groups (0, 2), (1, 3).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """Data- and expert-parallel coordinates of one job.

    Raises ValueError if ``ep`` does not divide ``world``.
    """

    world: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        if self.world < 1 or self.ep < 1 or self.world % self.ep:
            raise ValueError(f"ep={self.ep} must divide the number of workers ({self.world})")

    def ep_rank(self, rank: int) -> int:
        return rank % self.ep

    def local_experts(self, rank: int, num_experts: int) -> range:
        """Global indices of the experts that ``rank`` holds in every MoE layer.

        Raises ValueError if ``ep`` does not divide ``num_experts``.
        """
        if num_experts % self.ep:
            raise ValueError(f"ep={self.ep} does not divide {num_experts} experts")
        per_rank = num_experts // self.ep
        first = self.ep_rank(rank) * per_rank
        return range(first, first + per_rank)

    def owners(self, expert: int, num_experts: int) -> tuple[int, ...]:
        """Ranks that hold a copy of global ``expert``."""
        return tuple(r for r in range(self.world) if expert in self.local_experts(r, num_experts))
