"""Rows spread to pairs and collected again, and their derivatives."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora.pairs import collect_rows, spread_rows
from moe.assignment import assign


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 6), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**16))
def test_values_and_derivatives_are_those_of_indexing(rows, choices, experts, seed):
    generator = torch.Generator().manual_seed(seed)
    index_TK = torch.randint(experts, (rows, choices), generator=generator)
    assignment = assign(index_TK, experts)
    x = torch.randn(rows, 3, dtype=torch.float64, generator=generator).requires_grad_()
    spread, want = spread_rows(x, assignment), x[assignment.row_N]
    assert torch.equal(spread, want)
    weight = torch.randn(spread.shape, dtype=torch.float64, generator=generator)
    (got,), (expected,) = (torch.autograd.grad((y * weight).sin().sum(), x, retain_graph=True) for y in (spread, want))
    torch.testing.assert_close(got, expected)
    y = weight.clone().requires_grad_()
    together = torch.zeros(rows, 3, dtype=torch.float64).index_add(0, assignment.row_N, y)
    torch.testing.assert_close(collect_rows(y, assignment), together)
    (got,), (expected,) = (torch.autograd.grad(z.sin().sum(), y) for z in (collect_rows(y, assignment), together))
    torch.testing.assert_close(got, expected)
