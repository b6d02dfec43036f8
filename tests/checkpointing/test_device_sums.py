"""Sums taken on a device and finished by the host are those of the xxhash library."""

import importlib.util
import os
import random
import struct
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_128_digest

from checkpointing.record_sums import RecordSums, whole_chunks
from checkpointing.xxh3 import BLOCK, SECRET, START, finish

MASK = (1 << 64) - 1


def accumulate(data: bytes) -> bytes:
    """All blocks but the last, one after another."""
    lanes, keys = list(START), [struct.unpack_from("<8Q", SECRET, 8 * stripe) for stripe in range(16)]
    scramble = struct.unpack_from("<8Q", SECRET, len(SECRET) - 64)
    for at in range(0, len(data) - BLOCK, BLOCK):
        for stripe in range(16):
            for lane, word in enumerate(struct.unpack_from("<8Q", data, at + 64 * stripe)):
                mixed = word ^ keys[stripe][lane]
                lanes[lane ^ 1] = (lanes[lane ^ 1] + word) & MASK
                lanes[lane] = (lanes[lane] + (mixed & 0xFFFFFFFF) * (mixed >> 32)) & MASK
        lanes = [((x ^ (x >> 47)) ^ key) * 0x9E3779B1 & MASK for x, key in zip(lanes, scramble, strict=True)]
    return struct.pack("<8Q", *lanes)


@pytest.mark.parametrize("blocks", [1, 2, 16, 33])
def test_a_finished_sum_is_the_librarys(blocks: int) -> None:
    data = random.Random(blocks).randbytes(blocks * BLOCK)
    assert finish(accumulate(data), data[-BLOCK:], len(data)) == xxh3_128_digest(data)


@given(st.lists(st.tuples(st.integers(0, 90), st.integers(0, 20)), max_size=6))
def test_whole_chunks_lie_in_one_part_and_none_is_left_out(stretches: list[tuple[int, int]]) -> None:
    payload, parts, at = {}, [], 0
    for size, gap in stretches:
        source = torch.arange(at, at + size)
        payload |= dict.fromkeys(range(at, at + size), len(parts))
        parts.append((source, at))
        at += size + gap
    found = {}
    for source, offset in parts:
        for number in whole_chunks((source, offset), 16):
            start = 16 * number - offset
            assert source[start : start + 16].tolist() == list(range(16 * number, 16 * (number + 1)))
            assert number not in found
            found[number] = True
    for chunk in range(at // 16 + 1):
        owners = {payload.get(place) for place in range(16 * chunk, 16 * (chunk + 1))}
        assert (chunk in found) == (len(owners) == 1 and None not in owners)


KERNELS = """
import torch
from xxhash import xxh3_128_digest
from checkpointing.device_sums import DeviceSums
from checkpointing.xxh3 import finish
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
for blocks in (16, 32, 48):
    chunk = 1024 * blocks
    torch.manual_seed(blocks)
    data = [torch.randint(0, 256, (n * chunk,), dtype=torch.uint8, device=device) for n in (3, 1, 2)]
    sums = DeviceSums(device, chunk)
    for _ in range(2):
        count = sums.queue([d.data_ptr() + at for d in data for at in range(0, d.numel(), chunk)])
        assert count == 6
        if device.type == "cuda": torch.cuda.synchronize()
        found = sums.take(count)
        plain = b"".join(bytes(d.cpu().numpy()) for d in data)
        for i, lanes in enumerate(found):
            part = plain[i * chunk : (i + 1) * chunk]
            assert finish(lanes, part[-1024:], chunk) == xxh3_128_digest(part), (blocks, i)
        data[1].add_(1)

# A record of three parts with gaps: what the device took of it and what is read give the seal that reading all gives.
from checkpointing import records
from checkpointing.record_sums import RecordSums
from checkpointing.records import PAGE, Header, Kind
chunk = records.CHUNK = 16 << 10
layout = ((50_000, 0), (40_008, 50_176), (99, 90_368))
parts = [(torch.randint(0, 256, (n,), dtype=torch.uint8), at) for n, at in layout]
slot = memoryview(bytearray(PAGE * 40))
slot[:] = bytes(range(256)) * (len(slot) // 256)  # gaps hold what was there before
for part, at in parts:
    slot[2 * PAGE + at : 2 * PAGE + at + part.numel()] = bytes(part.numpy())
records.finish(slot, Header(Kind.BASE, 3, 0, 0, 4, 2 * PAGE, 98_304), b"[0]" + bytes([10]))
sums = RecordSums(DeviceSums(device, chunk), chunk)
taken = sums.take_records(sums.queue_records([(7, [(p.to(device), at) for p, at in parts], ())], None))
assert sorted(taken[7]) == [0, 1, 2, 4], taken
assert records.checksum(slot, None, taken[7]) == records.checksum(slot)
records.seal(slot, None, taken[7])
records.verify(slot)
slot[2 * PAGE + 20_000] ^= 4
assert records.checksum(slot) != records.checksum(slot, None, taken[7]), "what was copied is not what was summed up"
try:
    records.verify(slot)
except records.RecordError:
    print("equal")

# Gradients: the product is torch's, and a log record's seal is the same with the sums that the scaling took.
from checkpointing.device_sums import scale_and_add
torch.manual_seed(1)
flat = torch.randn(26_628, device=device).to(torch.bfloat16)  # 53,256 bytes: 52 blocks and a rest
flat[:4] = torch.tensor([float("inf"), -0.0, 1e-40, -3e38])
grad, factor = torch.full((26_628,), 9.0, device=device), torch.tensor([0.3137], device=device)
blocks = scale_and_add(flat, factor, grad)
assert torch.equal(grad, flat.float().mul_(factor))
log = flat.view(torch.uint8)
slot[2 * PAGE : 2 * PAGE + log.numel()] = bytes(log.cpu().numpy())
records.finish(slot, Header(Kind.LOG, 3, 0, 0, 4, 2 * PAGE, log.numel()), b"[0]" + bytes([10]))
other = torch.randint(0, 256, (chunk,), dtype=torch.uint8).to(device)
pair = [(7, [(log, 0)], [blocks]), (8, [(other, 0)], ())]
taken = sums.take_records(sums.queue_records(pair, None))
assert sorted(taken[7]) == [0, 1, 2] and sorted(taken[8]) == [0], taken
assert records.checksum(slot, None, taken[7]) == records.checksum(slot)
part = bytes(other.cpu().numpy())
assert finish(taken[8][0], part[-1024:], chunk) == xxh3_128_digest(part)
print("equal")
"""


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@needs_triton
@pytest.mark.timeout(120)
def test_the_kernels_sums_are_the_librarys() -> None:
    _run_kernels({"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""})


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.timeout(120)
def test_the_sums_of_compiled_kernels_are_the_librarys() -> None:
    _run_kernels({"TRITON_INTERPRET": "0"})


def _run_kernels(more: dict[str, str]) -> None:
    command = [sys.executable, "-c", KERNELS]
    done = subprocess.run(command, env=os.environ | more, capture_output=True, text=True, timeout=100)
    assert done.stdout == "equal\nequal\n", done.stderr


class Without:
    """A device without room, or without a compiler."""

    asked = 0

    def queue(self, *_: object) -> int:
        self.asked += 1
        raise RuntimeError("CUDA out of memory\nand much more")


def test_a_device_that_cannot_leaves_all_sums_to_the_keeper(capsys: pytest.CaptureFixture[str]) -> None:
    device = Without()
    sums = RecordSums(device, 1024)  # type: ignore[arg-type]
    records = [(3, [(torch.zeros(4096, dtype=torch.uint8), 0)], ())]
    for _ in range(2):
        assert sums.take_records(sums.queue_records(records, None)) == {}
    assert device.asked == 1
    assert capsys.readouterr().err == "the GPU takes no checksums (CUDA out of memory); the keeper takes all\n"
