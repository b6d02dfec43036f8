"""Balance without an auxiliary loss: a bias on the scores by which experts are chosen (DeepSeek-V3, section 2.1.2).

Shapes: M MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from moe.routing import RoutingError

EXTRA = "balance.bias"


class BiasBalance:
    """The biases of all layers, and the choices counted since they were last moved. The same on all ranks.

    Kept outside the model, in fp32: casting or moving a model must not touch it, and it is no weight.

    Args:
        begin: each layer's first biases [E], by global layer index.
        rate: by how much a bias moves in each optimizer step.
        total: sums a tensor over all ranks, in place.
    """

    def __init__(
        self,
        begin: Mapping[int, Tensor],
        rate: float,
        device: torch.device | str = "cpu",
        total: Callable[[Tensor], object] | None = None,
    ) -> None:
        self.layers: Sequence[int] = tuple(sorted(begin))
        self.bias_ME = torch.stack([begin[layer].detach().float() for layer in self.layers]).to(device)
        self._counts_ME = torch.zeros_like(self.bias_ME, dtype=torch.int64)
        self._rate, self._total = rate, total

    def row(self, layer: int) -> Tensor:
        """The layer's biases [E]: a view, which moves with them."""
        return self.bias_ME[self.layers.index(layer)]

    def add(self, layer: int, counts_E: Tensor) -> None:
        """Count the choices of one micro-batch on this rank."""
        self._counts_ME[self.layers.index(layer)] += counts_E

    def commit(self) -> None:
        """After the optimizer step: experts chosen more often than the mean get less likely, the others more.

        One exchange for all layers. The comparison is between whole numbers, so that ranks cannot differ.
        """
        if self._total is not None:
            self._total(self._counts_ME)
        excess_ME = self._counts_ME * self._counts_ME.shape[1] - self._counts_ME.sum(1, keepdim=True)
        self.bias_ME -= self._rate * excess_ME.sign()
        self._counts_ME.zero_()

    def dump(self) -> bytes:
        """The biases, fp32. Between steps, when state is captured, no counts are pending: :meth:`commit` took them."""
        return self.bias_ME.cpu().numpy().tobytes()

    def load(self, blob: bytes) -> None:
        """Inverse of :meth:`dump`; pending counts are forgotten. Raises RoutingError if the sizes differ."""
        if len(blob) != 4 * self.bias_ME.numel():
            raise RoutingError(
                f"the checkpoint has {len(blob) // 4} selection biases, the model {self.bias_ME.numel()}; use the "
                "recipe that wrote it"
            )
        self.bias_ME.copy_(biases(blob, self.bias_ME.shape[1]))
        self._counts_ME.zero_()


def biases(blob: bytes, num_experts: int) -> Tensor:
    """What :meth:`BiasBalance.dump` wrote, [M,E], layers in ascending order."""
    return torch.frombuffer(bytearray(blob), dtype=torch.float32).view(-1, num_experts)
