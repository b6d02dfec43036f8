"""What a decode step does between its products, in Triton: attention, sums with their norm, a gate's choice.

Queries and keys are turned and kept in one launch, paged keys read where they lie.

With one row per sequence attention is a few small products between many small operations, and costs as many launches.
Keys are split among programs, each of which keeps a running softmax (Milakov and Gimelshein, arXiv 1805.02867); the
parts are merged in order (Dao et al., Flash-Decoding, 2023). Positions come from the device, so one captured launch
serves every length.

Shapes: R rows, one of each sequence; H heads, K key and value heads, G = H/K, X = H + 2K, D numbers of a head, M blocks
of S positions, P positions of the pool.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_SPLIT, _KEYS = 128, 64  # keys of a program, and of one turn of its loop


@triton.jit
def _turn(qkv, weight, cos, sin, slot_R, pool, q, eps, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
          NORMED: tl.constexpr):  # fmt: skip
    row, x = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, D)
    swapped = (d + D // 2) % D
    head = qkv + (row * (H + 2 * K) + x) * D
    value = tl.load(head + d).to(tl.float32)
    if x < H + K:
        other = tl.load(head + swapped).to(tl.float32)
        if NORMED:
            scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / D + eps)
            value = value * scale * tl.load(weight + x * D + d).to(tl.float32)
            other = other * scale * tl.load(weight + x * D + swapped).to(tl.float32)
        value = value * tl.load(cos + row * D + d).to(tl.float32) + other * tl.load(sin + row * D + d).to(tl.float32)
    if x < H:
        tl.store(q + (row * H + x) * D + d, value.to(q.dtype.element_ty))
    else:
        at = tl.load(slot_R + row).to(tl.int64) * (2 * K) + (x - H)
        tl.store(pool + at * D + d, value.to(pool.dtype.element_ty))


@triton.jit
def _attend(q, pool, table, position_R, part, top, total, scale, blocks, WINDOW: tl.constexpr, H: tl.constexpr,
            K: tl.constexpr, G16: tl.constexpr, D: tl.constexpr, S: tl.constexpr, SPLIT: tl.constexpr,
            KEYS: tl.constexpr):  # fmt: skip
    row, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    G: tl.constexpr = H // K
    last = tl.load(position_R + row)
    first = tl.maximum(last - WINDOW + 1, 0) if WINDOW > 0 else last * 0
    g, d = tl.arange(0, G16), tl.arange(0, D)
    query = tl.load(q + (row * H + head * G + g)[:, None] * D + d[None, :], mask=(g < G)[:, None], other=0.0)
    best = tl.full((G16,), float("-inf"), dtype=tl.float32)
    weight = tl.zeros((G16,), dtype=tl.float32)
    mixed = tl.zeros((G16, D), dtype=tl.float32)
    for turn in range(SPLIT // KEYS):
        key = split * SPLIT + turn * KEYS + tl.arange(0, KEYS)
        seen = (key <= last) & (key >= first)
        block = tl.load(table + row * blocks + key // S, mask=seen, other=0)
        at = ((block * S + key % S) * (2 * K) + head)[:, None] * D + d[None, :]
        k = tl.load(pool + at, mask=seen[:, None], other=0.0)
        score = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
        score = tl.where(seen[None, :], score, float("-inf"))
        higher = tl.maximum(best, tl.max(score, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # no key seen so far
        share = tl.exp(score - base[:, None])
        before = tl.exp(best - base)
        v = tl.load(pool + at + K * D, mask=seen[:, None], other=0.0)
        mixed = mixed * before[:, None] + tl.dot(share.to(v.dtype), v, input_precision="ieee")
        weight = weight * before + tl.sum(share, 1)
        best = higher
    splits = tl.num_programs(2)
    line = (row * H + head * G + g) * splits + split
    tl.store(top + line, best, mask=g < G)
    tl.store(total + line, weight, mask=g < G)
    tl.store(part + line[:, None] * D + d[None, :], mixed, mask=(g < G)[:, None])


@triton.jit
def _merge(part, top, total, out, splits, SPLITS: tl.constexpr, D: tl.constexpr):
    line = tl.program_id(0).to(tl.int64)
    s, d = tl.arange(0, SPLITS), tl.arange(0, D)
    best = tl.load(top + line * splits + s, mask=s < splits, other=float("-inf"))
    share = tl.exp(best - tl.max(best, 0))
    weight = tl.sum(share * tl.load(total + line * splits + s, mask=s < splits, other=0.0), 0)
    mixed = tl.load(part + (line * splits + s)[:, None] * D + d[None, :], mask=(s < splits)[:, None], other=0.0)
    tl.store(out + line * D + d, (tl.sum(mixed * share[:, None], 0) / weight).to(out.dtype.element_ty))


def serves(width: int) -> bool:
    """Whether heads of so many numbers are among those that the kernels are written for."""
    return width >= 16 and width & (width - 1) == 0


def attention(
    qkv_RXD: Tensor,
    cos_R1D: Tensor,
    sin_R1D: Tensor,
    slot_R: Tensor,
    layer_NSCD: Tensor,
    table_RM: Tensor,
    position_R: Tensor,
    *,
    heads: int,
    scale: float,
    window: int | None = None,
    norm: tuple[Tensor, float] | None = None,
) -> Tensor:
    """Keeps the rows' keys and values and attends: [R, H*D].

    Args:
        qkv_RXD: projected queries, keys and values, not yet normed or turned.
        cos_R1D, sin_R1D: as :class:`inference.rope.RopeTable` gives them, the minus in sin.
        slot_R: position of the pool that each row is written to.
        position_R: of each row in its sequence; it sees all keys up to there, or the last ``window`` of them.
        norm: weights [H+K, D] and epsilon of a norm over each head of queries and keys.
    """
    rows, kv_heads = len(qkv_RXD), layer_NSCD.shape[2] // 2
    width, blocks = qkv_RXD.shape[2], table_RM.shape[1]
    assert all(tensor.is_contiguous() for tensor in (qkv_RXD, layer_NSCD, table_RM))
    assert serves(width), width
    assert qkv_RXD.shape[1] == heads + 2 * kv_heads, (qkv_RXD.shape, heads, kv_heads)
    q_RHD = qkv_RXD.new_empty(rows, heads, width)
    weight, eps = (qkv_RXD, 0.0) if norm is None else norm
    _turn[(rows, heads + 2 * kv_heads)](
        qkv_RXD, weight, cos_R1D, sin_R1D, slot_R, layer_NSCD, q_RHD, eps, heads, kv_heads, width, norm is not None,
        num_warps=1,
    )  # fmt: skip
    size = layer_NSCD.shape[1]
    splits = triton.cdiv(blocks * size, _SPLIT)
    part = torch.empty(rows, heads, splits, width, dtype=torch.float32, device=qkv_RXD.device)
    top, total = part.new_empty(2, rows, heads, splits).unbind()
    _attend[(rows, kv_heads, splits)](
        q_RHD, layer_NSCD, table_RM, position_R, part, top, total, scale, blocks, window or 0, heads, kv_heads,
        max(16, triton.next_power_of_2(heads // kv_heads)), width, size, _SPLIT, _KEYS, num_warps=4,
    )  # fmt: skip
    out_RX = qkv_RXD.new_empty(rows, heads * width)
    _merge[(rows * heads,)](part, top, total, out_RX, splits, triton.next_power_of_2(splits), width, num_warps=1)
    return out_RX


@triton.jit
def _add_norm(x, added, weight, total, normed, eps, hidden: tl.constexpr, BH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * hidden
    h = tl.arange(0, BH)
    here = h < hidden
    both = tl.load(x + row + h, mask=here, other=0.0).to(tl.float32)
    both = (both + tl.load(added + row + h, mask=here, other=0.0).to(tl.float32)).to(total.dtype.element_ty)
    tl.store(total + row + h, both, mask=here)
    value = both.to(tl.float32)  # the norm is of the sum as it is kept
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / hidden + eps)
    value = value * scale * tl.load(weight + h, mask=here, other=0.0).to(tl.float32)
    tl.store(normed + row + h, value.to(normed.dtype.element_ty), mask=here)


def add_norm(x_RH: Tensor, added_RH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(``x + added``, its root mean square norm), in one launch."""
    x_RH, added_RH = x_RH.contiguous(), added_RH.contiguous()
    total_RH, normed_RH = torch.empty_like(x_RH), torch.empty_like(x_RH)
    rows, hidden = x_RH.shape
    _add_norm[(rows,)](
        x_RH, added_RH, weight_H, total_RH, normed_RH, eps, hidden, triton.next_power_of_2(hidden), num_warps=8
    )
    return total_RH, normed_RH


@triton.jit
def _choose(logits, score, index, experts: tl.constexpr, E: tl.constexpr, choices: tl.constexpr, K: tl.constexpr,
            SHARES: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    e, k = tl.arange(0, E), tl.arange(0, K)
    value = tl.load(logits + row * experts + e, mask=e < experts, other=float("-inf")).to(tl.float32)
    chance = tl.exp(value - tl.max(value, 0))
    total = tl.sum(chance, 0)
    share = chance / total
    # A row with NaN has no shares. Lanes beyond the experts must not win there either: nobody has such an expert.
    left = tl.where(e < experts, tl.where(share == share, share, 0.0), -1.0)
    best, which = tl.zeros((K,), dtype=tl.float32), tl.zeros((K,), dtype=tl.int32)
    for turn in range(choices):
        highest = tl.max(left, 0)
        at = tl.min(tl.where(left == highest, e, E - 1), 0)
        best, which = tl.where(k == turn, highest, best), tl.where(k == turn, at, which)
        left = tl.where(e == at, -2.0, left)
    if SHARES:
        best = best / tl.sum(best, 0)
    best = tl.where(total == total, best, total)
    tl.store(score + row * choices + k, best.to(score.dtype.element_ty), mask=k < choices)
    tl.store(index + row * choices + k, which.to(tl.int64), mask=k < choices)


def choose(logits_RE: Tensor, choices: int, *, shares: bool) -> tuple[Tensor, Tensor]:
    """The best of a softmax over experts: scores [R,K] in the logits' precision, best first, and which [R,K].

    Where logits are NaN all scores of the row are, for any experts.

    Args:
        shares: divide the scores by their sum.
    """
    rows, experts = logits_RE.shape
    score_RK = logits_RE.new_empty(rows, choices)
    index_RK = torch.empty(rows, choices, dtype=torch.int64, device=logits_RE.device)
    _choose[(rows,)](
        logits_RE, score_RK, index_RK, experts, triton.next_power_of_2(experts), choices,
        triton.next_power_of_2(choices), shares, num_warps=1,
    )  # fmt: skip
    return score_RK, index_RK
