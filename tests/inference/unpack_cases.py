"""The kernel that unpacks against the reference; run by test_slot_kernels.py, interpreted where there is no GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from inference.packed import GROUP, TILE, PackedBlock, pack
from inference.unpack_kernel import unpack_on_device
from tests.inference.test_packed import of_bits, same_bits, weights, with_outliers

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def on_device(block_B):
    """Unpacked on the device into what was something else."""
    packed = pack(block_B)
    form = PackedBlock(len(block_B))
    buffer = torch.full((form.stride,), 0xAB, dtype=torch.uint8, device=DEVICE)
    buffer[: len(packed)] = packed.to(DEVICE)
    got_B = torch.full((len(block_B),), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    unpack_on_device(buffer, got_B)
    return got_B.cpu()


@pytest.mark.parametrize("elements", [GROUP, TILE - GROUP, TILE, TILE + GROUP, 3 * TILE + 96])
def test_blocks_of_any_length_come_back(elements):
    block_B = weights(elements)
    assert same_bits(on_device(block_B), block_B)


def test_patterns_come_back():
    patterns = np.arange(0, 65536, 1 if DEVICE.type == "cuda" else 37)  # interpreting takes time
    block_B = torch.ones(128 * len(patterns)).bfloat16()
    block_B[::128] = of_bits(patterns)
    assert same_bits(on_device(block_B), block_B)


@pytest.mark.parametrize("crowded", [0, 1, 300])
def test_exceptions_come_to_their_places_however_they_lie(crowded):
    """At both ends of tiles; and more in one than a program takes at once."""
    elements = 12 * TILE
    at = [0, TILE - 1, TILE, 5 * TILE - 1, elements - 1, *range(7 * TILE, 7 * TILE + crowded)]
    bits = [(0x7FC1, 0x0080, 0xFF80, 0x8001, 0x7F7F, 0x0000)[turn % 6] for turn in range(len(at))]
    block_B = with_outliers(elements, at, bits)
    assert same_bits(on_device(block_B), block_B)
