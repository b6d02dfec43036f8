"""More groups than one of torch's grouped products takes run in several, with the same values and gradients."""

from __future__ import annotations

import pytest
import torch

from moe.kernels import grouped
from moe.kernels.grouped import grouped_linear


@pytest.mark.parametrize("most", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("counts", [[2, 0, 1, 3, 0, 1, 2], [0, 0, 0, 5, 0, 0, 0], [0, 4, 0, 0, 0, 0, 0], [1] * 7])
def test_chunks_of_groups_match_the_loop(monkeypatch, most, counts):
    """On CPU, where torch runs grouped products in fp32, too."""
    monkeypatch.setattr(grouped, "MOST_GROUPS", most)
    draw, found = torch.Generator().manual_seed(0), []
    x, weight = torch.randn(sum(counts), 16, generator=draw), torch.randn(7, 8, 16, generator=draw)
    upstream = torch.randn(sum(counts), 8, generator=draw)
    for backend in ("grouped_mm", "loop"):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        y = grouped_linear(*leaves, torch.tensor(counts), backend)
        y.backward(upstream)
        found.append([y.detach(), *(t.grad for t in leaves)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_is_not_a_number_stays_in_its_group(monkeypatch):
    monkeypatch.setattr(grouped, "MOST_GROUPS", 2)
    x, weight = torch.randn(5, 16), torch.randn(5, 8, 16).requires_grad_()
    x[1] = torch.nan
    y = grouped_linear(x, weight, torch.ones(5, dtype=torch.int64), "grouped_mm")
    y.sum().backward()
    assert y.isnan().any(1).tolist() == [False, True, False, False, False]
    assert weight.grad.isnan().flatten(1).any(1).tolist() == [False, True, False, False, False]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("groups", [1023, 1024, 2500])
def test_a_gpu_takes_as_many_groups_as_there_are(groups):
    counts = torch.arange(groups) % 3
    x = torch.randn(int(counts.sum()), 16, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(groups, 8, 16, device="cuda", dtype=torch.bfloat16)
    got = grouped_linear(x, weight, counts.cuda(), "grouped_mm")
    want = torch.einsum("nm,nom->no", x.float(), weight.float().repeat_interleave(counts.cuda(), 0))
    torch.testing.assert_close(got.float(), want, rtol=0.02, atol=0.05)
