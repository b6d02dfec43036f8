"""Expert layers and routings for the kernels' tests, and the comparison with the naive reference."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from moe.assignment import assign
from moe.experts import Experts
from moe.form import PLAIN, ExpertForm
from moe.kernels.reference import moe_reference

GPT_OSS = ExpertForm(transposed=True, interleaved=True, limit=1.0, alpha=1.702)


@dataclass
class Case:
    """``experts``: which experts a token may choose, -1 for one that is not here; default all local ones."""

    tokens: int = 13
    top_k: int = 2
    hidden: int = 12
    inner: int = 7
    num_experts: int = 5
    choices: list[int] = field(default_factory=list)
    form: ExpertForm = PLAIN
    biased: bool = False
    dtype: torch.dtype = torch.float64
    device: str = "cpu"

    def build(self, backend, seed=0):
        """(experts, x, weights, index with ``num_experts`` for a choice that is not here)."""
        draw = torch.Generator().manual_seed(seed)
        up, down = (2 * self.inner, self.hidden), (self.hidden, self.inner)
        if self.form.transposed:
            up, down = up[::-1], down[::-1]

        def parameter(*shape):
            value = torch.randn(shape, generator=draw, dtype=torch.float64) / shape[-1] ** 0.5
            return torch.nn.Parameter(value.to(self.device, self.dtype))

        biases = {}
        if self.biased:
            biases = {
                "gate_up_bias": parameter(self.num_experts, 2 * self.inner),
                "down_bias": parameter(self.num_experts, self.hidden),
            }
        stacks = parameter(self.num_experts, *up), parameter(self.num_experts, *down)
        experts = Experts(*stacks, self.form, layer=0, **biases)
        experts.wanted_backend = backend
        allowed = torch.tensor(self.choices or list(range(self.num_experts)))
        index = allowed[torch.rand(self.tokens, allowed.numel(), generator=draw).argsort(1)[:, : self.top_k]]
        index = torch.where(index < 0, self.num_experts, index).to(self.device)
        x = torch.randn(self.tokens, self.hidden, generator=draw, dtype=torch.float64)
        weights = torch.rand(self.tokens, self.top_k, generator=draw, dtype=torch.float64)
        x, weights = (t.to(self.device, self.dtype).requires_grad_() for t in (x, weights))
        return experts, x, weights, index


def run(experts, x, weights, index):
    here = index < experts.num_local_experts
    pairs = None if bool(here.all()) else int(here.sum())
    return experts.mix(x, weights, assign(index, experts.num_local_experts, pairs))


def reference(experts, x, weights, index):
    stacks = experts.gate_up_proj, experts.down_proj
    return moe_reference(x, index, weights, *stacks, experts.form, *experts.biases)


def compare(case, backend, tolerance=1e-10, seed=0):
    """Output and every gradient of ``backend`` against the reference's, as norm of difference over norm."""
    experts, x, weights, index = case.build(backend, seed)
    inputs = (x, weights, *experts.parameters())
    ours, theirs = run(experts, x, weights, index), reference(experts, x, weights, index)
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(ours)
    got = torch.autograd.grad(ours, inputs, upstream)  # also for no tokens: a gradient must exist
    want = torch.zeros_like(ours), *(torch.zeros_like(t) for t in inputs)
    if theirs.requires_grad:
        found = torch.autograd.grad(theirs, inputs, upstream, allow_unused=True, materialize_grads=True)
        want = theirs, *found
    names = ("output", "x", "weights", *(name for name, _ in experts.named_parameters()))
    for name, g, w in zip(names, (ours, *got), want, strict=True):
        assert g.shape == w.shape, name
        assert g.dtype == w.dtype, name
        error = float((g - w).detach().norm() / w.detach().norm().clamp(min=1e-30)) if w.numel() else 0.0
        assert error <= tolerance, f"{backend}, {name}: {error:.2e}"
