"""Cases of the decode step's attention kernels; run by test_slot_kernels.py, interpreted where there is no GPU.

Shapes: R rows, H heads, K key and value heads, D numbers of a head, M blocks of S positions, N blocks of the pool.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from inference.decode_kernels import add_norm, attention, choose
from inference.dense import Norm
from inference.rope import rotated

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "size", "blocks", "positions", "window", "normed"),
    [
        (4, 2, 16, 4, 5, [0, 7, 19], None, True),
        (3, 3, 32, 16, 20, [300, 129], None, False),
        (8, 1, 16, 16, 20, [317, 40, 127, 128], 33, True),
    ],
)
def test_as_torch(heads, kv_heads, width, size, blocks, positions, window, normed):
    g = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(DEVICE)

    rows, pool_blocks = len(positions), len(positions) * blocks
    pool = torch.full((pool_blocks, size, 2 * kv_heads, width), float("nan"), device=DEVICE)
    table = torch.randperm(pool_blocks, generator=g).view(rows, blocks).to(DEVICE)
    for row, position in enumerate(positions):  # what is kept; all that no row may see stays NaN
        for at in range(position):
            pool[table[row, at // size], at % size] = drawn(2 * kv_heads, width)
    qkv, cos, sin = drawn(rows, heads + 2 * kv_heads, width), drawn(rows, 1, width), drawn(rows, 1, width)
    weight = drawn(heads + kv_heads, width)
    position_R = torch.tensor(positions, device=DEVICE)
    slot_R = table.gather(1, position_R[:, None] // size)[:, 0] * size + position_R % size

    qk = qkv[:, : heads + kv_heads]
    if normed:
        qk = F.rms_norm(qk, (width,), None, 1e-6) * weight
    qk = rotated(qk, cos, sin)
    kept = torch.cat([qk[:, heads:], qkv[:, heads + kv_heads :]], dim=1)
    want = []
    for row, position in enumerate(positions):
        past = pool[table[row]].flatten(0, 1)[:position]
        seen = torch.cat([past, kept[row : row + 1]])[max(position - window + 1, 0) if window else 0 :]
        k, v = (part.repeat_interleave(heads // kv_heads, 1).transpose(0, 1) for part in seen.split(kv_heads, dim=1))
        want.append(F.scaled_dot_product_attention(qk[row, :heads, None], k, v, scale=0.3).flatten())

    found = attention(
        qkv, cos, sin, slot_R, pool, table, position_R, heads=heads, scale=0.3, window=window,
        norm=(weight, 1e-6) if normed else None,
    )  # fmt: skip
    assert torch.allclose(found, torch.stack(want), rtol=1e-4, atol=1e-4)
    assert torch.allclose(pool.flatten(0, 1)[slot_R], kept, rtol=1e-4, atol=1e-4)


def test_the_sum_and_its_norm_are_torchs():
    x, added, weight = (torch.randn(*size, device=DEVICE) for size in ((3, 80), (3, 80), (80,)))
    total, normed = add_norm(x, added, weight, 1e-6)
    assert torch.equal(total, x + added)
    torch.testing.assert_close(normed, F.rms_norm(x + added, (80,), weight, 1e-6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sum_and_its_norm_are_as_precise_as_the_model(dtype):
    x, added = (torch.randn(3, 80, device=DEVICE, dtype=dtype) for _ in range(2))
    norm = Norm(torch.randn(80, device=DEVICE, dtype=dtype), 1e-6)
    total, normed = norm.behind(x, added)
    assert torch.equal(total, x + added)
    torch.testing.assert_close(normed, F.rms_norm(x + added, (80,), norm.weight_H, 1e-6))
    assert (norm._add_norm is None) == (dtype == torch.float64)


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize(("experts", "choices"), [(128, 8), (60, 4), (8, 1)])
def test_the_choice_is_torchs(experts, choices, shares):
    logits = torch.randn(3, experts, device=DEVICE)
    score, index = choose(logits, choices, shares=shares)
    want, which = logits.softmax(-1).topk(choices)
    assert torch.equal(index, which)
    torch.testing.assert_close(score, want / want.sum(-1, keepdim=True) if shares else want)


def test_equal_chances_are_chosen_in_order():
    _, index = choose(torch.zeros(1, 6, device=DEVICE), 3, shares=True)
    assert index.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_row_without_numbers_chooses_experts_that_there_are(broken, shares):
    logits = torch.randn(3, 60, device=DEVICE)
    want = choose(logits, 4, shares=shares)
    logits[1] = broken
    score, index = choose(logits, 4, shares=shares)
    assert (index < 60).all()
    assert len(set(index[1].tolist())) == 4
    assert score[1].isnan().all(), "not a number that would hide it"
    for found, whole in zip((score, index), want, strict=True):
        assert torch.equal(found[::2], whole[::2])
