"""What is asked of CUDA's driver for packed blocks, in which order; on a GPU test_link_cuda.py has it done."""

from __future__ import annotations

import ctypes

import pytest

from inference.cuda_link import RingStruct
from inference.native import library, opened

pytestmark = pytest.mark.skipif(isinstance(opened(), str), reason="no C compiler")

COUNT, POINTER, UNSIGNED = 4, ctypes.c_void_p, ctypes.c_uint
COPYING, UNPACKING, KERNEL = 101, 102, 103
ARRIVED, FREE = [201, 202, 203, 204], [301, 302]
BUFFER, TARGET, PACKED = [1 << 40 | n for n in range(COUNT)], 401, 501


def bring(turn: int, fails: str = "") -> tuple[int, list[tuple]]:
    """The status of one block's turn, and the calls made for it; the one that ``fails`` returns 700."""
    calls: list[tuple] = []

    def said(name, *arguments):
        def call(*given):
            calls.append((name, *given, *(numbers[:2] if name == "launch" else ())))
            return 700 * (name == fails)

        return ctypes.CFUNCTYPE(ctypes.c_int, *arguments)(call)

    numbers = (ctypes.c_uint64 * 8)()
    arrays = ((ctypes.c_uint64 * COUNT)(*BUFFER), (POINTER * COUNT)(*ARRIVED), (POINTER * 2)(*FREE), numbers)
    driver = (
        said("copy", ctypes.c_uint64, POINTER, ctypes.c_size_t, POINTER),
        said("record", POINTER, POINTER),
        said("wait", POINTER, POINTER, UNSIGNED),
        said("launch", POINTER, *[UNSIGNED] * 7, POINTER, POINTER, POINTER),
    )
    buffers, arrived, free, arguments = map(ctypes.addressof, arrays)
    addresses = (ctypes.cast(call, POINTER) for call in driver)
    ring = RingStruct(*addresses, COPYING, UNPACKING, buffers, arrived, free, KERNEL, arguments, 601, COUNT, 9, 128, 16)
    return library().ring_bring(ctypes.addressof(ring), turn, TARGET, PACKED, 77), calls


@pytest.mark.parametrize("turn", range(COUNT))
def test_a_block_crosses_and_is_unpacked_behind_it(turn):
    status, calls = bring(turn)
    assert status == 0
    launched = ("launch", KERNEL, 9, 1, 1, 128, 1, 1, 16, UNPACKING, 601, None, BUFFER[turn], TARGET)
    expected = [
        ("copy", BUFFER[turn], PACKED, 77, COPYING),
        ("record", ARRIVED[turn], COPYING),
        ("wait", UNPACKING, ARRIVED[turn], 0),
        launched,
    ]
    if turn % 2 == 0:  # the first of a half waits until the half is free; the last says when it is
        expected = [("wait", COPYING, FREE[turn // 2], 0), *expected]
    else:
        expected.append(("record", FREE[turn // 2], UNPACKING))
    assert calls == expected


@pytest.mark.parametrize("fails", ["copy", "record", "wait", "launch"])
def test_what_the_driver_refuses_is_returned_and_nothing_follows(fails):
    status, calls = bring(2, fails)
    assert status == 700
    assert calls[-1][0] == fails
