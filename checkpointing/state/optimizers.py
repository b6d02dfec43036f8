"""The optimizers of training as classes, also for a process that redoes another's steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from checkpointing.moments import MOMENTS


class Lion(torch.optim.Optimizer):
    """Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2), which torch lacks: one moment, and steps of one size.

    With gradient g and moment m: w -= lr (sign(b1 m + (1 - b1) g) + decay w), then m = b2 m + (1 - b2) g.

    Args:
        lr: the authors advise 3 to 10 times less than AdamW's, and a weight decay as many times larger.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "exp_avg" not in state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"] = torch.zeros_like(parameter)
                moment = state["exp_avg"]
                update = torch.lerp(parameter.grad, moment, beta1).sign_()
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
                moment.lerp_(parameter.grad, 1 - beta2)
                state["step"] += 1
        return loss


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The class of this name, torch's or ours."""
    return Lion if name == "Lion" else getattr(torch.optim, name)


def counts_steps(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its state of a parameter has ``step``."""
    return not isinstance(optimizer, torch.optim.SGD)


def moments_of(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """The names of the tensors that it keeps of each parameter."""
    return MOMENTS[type(optimizer).__name__]
