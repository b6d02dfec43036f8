"""Packed blocks: every bit comes back. Shapes: B elements of a block, X exceptions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.expert_block import ExpertBlock, ExpertShape
from inference.packed import GROUP, HEADER, OTHER, TILE, PackedBlock, pack, packable, unpack
from inference.packing import pack_into, unpack_into, unpack_rows


def of_bits(bits_B: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(bits_B.astype(np.uint16).view(np.int16)).view(torch.bfloat16)


def same_bits(a_B: torch.Tensor, b_B: torch.Tensor) -> bool:
    return torch.equal(a_B.view(torch.int16), b_B.view(torch.int16))


def weights(elements: int, seed: int = 0, scale: float = 0.02) -> torch.Tensor:
    return (torch.randn(elements, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


def with_outliers(elements: int, at: list[int], bits: list[int], seed: int = 0) -> torch.Tensor:
    block_B = weights(elements, seed)
    for place, value in zip(at, bits, strict=False):
        block_B.view(torch.int16)[place % elements] = int(np.uint16(value).view(np.int16))
    return block_B


BLOCKS = st.builds(
    with_outliers,
    st.integers(1, 400).map(lambda groups: groups * GROUP),
    st.lists(st.integers(0, 1 << 20), max_size=40),
    st.lists(st.integers(0, 65535), min_size=40, max_size=40),
    st.integers(0, 99),
)


@pytest.mark.parametrize("part", range(16))
def test_all_patterns_come_back(part):
    block_B = torch.ones(128 * 4096).bfloat16()
    block_B[::128] = of_bits(np.arange(part * 4096, (part + 1) * 4096))
    assert same_bits(unpack(pack(block_B), len(block_B)), block_B)


@settings(max_examples=60, deadline=None)
@given(block_B=BLOCKS)
def test_what_is_packed_comes_back(block_B):
    packed = pack(block_B)
    if packed is None:
        return
    form = PackedBlock(len(block_B))
    assert HEADER + 1.5 * len(block_B) < len(packed) <= form.stride
    assert form.stride % 64 == form.exceptions % 64 == 0
    assert len(packed) == form.used(int(packed[4:8].view(torch.int32)))
    more = torch.cat([packed, torch.full((64,), 7, dtype=torch.uint8)])
    assert same_bits(unpack(more, len(block_B)), block_B)


def test_zeros_and_subnormals_are_no_exceptions():
    patterns = np.tile(np.concatenate([np.arange(128), np.arange(0x8000, 0x8080)]), 32)
    packed = pack(of_bits(patterns))
    assert packed[4:8].view(torch.int32) == 0
    assert same_bits(unpack(packed, len(patterns)), of_bits(patterns))


def test_the_window_leaves_fewest_outside():
    fields = [200] * 500 + [186] * 500 + [185] * 8 + [201] * 4 + [0] * 20
    packed = pack(of_bits(np.array(fields + [0] * (1120 - len(fields))) << 7))
    assert packed is None, "12 exceptions of 1,120 elements"
    many = np.array(fields + [0] * (2048 - len(fields))) << 7
    packed = pack(of_bits(many))
    assert packed[:8].view(torch.int32).tolist() == [200, 12]
    assert pack(torch.zeros(64).bfloat16())[:8].view(torch.int32).tolist() == [OTHER, 0]
    assert pack(torch.full((64,), torch.inf).bfloat16())[:8].view(torch.int32).tolist() == [255, 0]


def test_exceptions_are_found_by_tile():
    block_B = torch.ones(3 * TILE + 64).bfloat16()
    at = [5, TILE - 1, 2 * TILE, 3 * TILE + 63]
    block_B[at] = 2.0**-100
    packed, form = pack(block_B), PackedBlock(len(block_B))
    assert packed[form.first :][:20].view(torch.int32).tolist() == [0, 2, 2, 3, 4]
    exceptions = packed[form.exceptions :].view(torch.int64)
    assert (exceptions >> 16).tolist() == at
    unpatched = packed.clone()
    unpatched[4:8] = 0
    assert (unpack(unpatched, len(block_B))[at].abs() < 2.0**-126).all()


def test_too_many_exceptions_are_refused():
    block_B = torch.ones(1280).bfloat16()
    block_B[:10] = 2.0**-100
    assert same_bits(unpack(pack(block_B), 1280), block_B)
    block_B[10] = 2.0**-100
    assert pack(block_B) is None


@pytest.mark.parametrize(
    ("hidden", "inner", "dtype", "want"),
    [
        (64, 32, torch.bfloat16, True),
        (64, 48, torch.bfloat16, False),
        (80, 32, torch.bfloat16, False),
        (64, 32, torch.float32, False),
        (64, 32, torch.float16, False),
    ],
)
def test_which_layouts_can_be_packed(hidden, inner, dtype, want):
    assert packable(ExpertBlock(ExpertShape(4, hidden, inner), dtype)) is want


@settings(max_examples=60, deadline=None)
@given(block_B=BLOCKS)
def test_compiled_code_packs_the_same_bytes(block_B):
    made = torch.full((PackedBlock(len(block_B)).stride,), 7, dtype=torch.uint8)
    used, want = pack_into(block_B, made), pack(block_B)
    if want is None:
        assert used == 0
        return
    assert torch.equal(made[:used], want)
    out_B = torch.empty_like(block_B)
    unpack_into(made, out_B)
    assert same_bits(out_B, block_B)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 5),
    beside=st.integers(0, 400),
    before=st.integers(0, 300),
    at=st.lists(st.integers(0, 1 << 20), max_size=60),
)
def test_rows_are_unpacked_to_their_places(rows, groups, beside, before, at):
    start, stride, columns = before * GROUP, (groups + beside) * GROUP, groups * GROUP
    elements = start + rows * stride
    block_B = torch.ones(elements).bfloat16()
    block_B[[place % elements for place in at][: elements // 128]] = 2.0**-100
    out_B = torch.full((elements,), torch.nan).bfloat16()
    unpack_rows(pack(block_B), out_B, start, rows, columns, stride)
    want_B = torch.full((elements,), torch.nan).bfloat16()
    want_B[start:].view(rows, stride)[:, :columns] = block_B[start:].view(rows, stride)[:, :columns]
    assert same_bits(out_B, want_B), "and nothing else"


@pytest.mark.parametrize("fields", [range(15, 256), range(1, 40), [0, 255], [0], [15], [255]])
def test_compiled_code_chooses_the_same_base(fields):
    g = torch.Generator().manual_seed(0)
    for _ in range(50):
        drawn = torch.tensor(fields)[torch.randint(len(fields), (4,), generator=g)]
        block_B = of_bits(drawn.numpy().repeat(1024) << 7)
        block_B[:8] = 2.0**-100
        made = torch.empty(PackedBlock(4096).stride, dtype=torch.uint8)
        want = pack(block_B)
        used = pack_into(block_B, made)
        assert used == 0 if want is None else torch.equal(made[:used], want)
