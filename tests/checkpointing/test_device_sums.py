"""Digests taken on a device are those of the xxhash library."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpointing.record_sums import Record, RecordSums, whole_chunks


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
from checkpointing import records
from checkpointing.device_sums import DeviceSums, scale_and_add
from checkpointing.record_sums import Chunks, Record, RecordSums
from checkpointing.records import PAGE, Header, Kind
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def take(sums, given):
    if device.type == "cuda":
        torch.cuda.current_stream().synchronize()
    return (sums.take if isinstance(sums, DeviceSums) else sums.take_records)(given)


def plainly(tensor, chunk):
    plain = bytes(tensor.cpu().numpy())
    return b"".join(xxh3_128_digest(plain[at : at + chunk]) for at in range(0, len(plain), chunk))


for blocks in (16, 32, 48, 64):
    chunk = 1024 * blocks
    torch.manual_seed(blocks)
    data = [torch.randint(0, 256, (n * chunk,), dtype=torch.uint8, device=device) for n in (3, 1, 2)]
    sums = DeviceSums(device, chunk)
    for _ in range(2):
        counts = sums.queue([Chunks(d.data_ptr(), d.numel() // chunk) for d in data])
        assert counts == [3, 1, 2]
        assert take(sums, counts) == [plainly(d, chunk) for d in data], blocks
        data[1].add_(1)

# A record of three parts with gaps: what the device took of it and what is read give the seal that reading all gives.
chunk = records.CHUNK = 16 << 10
layout = ((50_000, 0), (40_008, 50_176), (99, 90_368))
parts = [(torch.randint(0, 256, (n,), dtype=torch.uint8), at) for n, at in layout]
slot = memoryview(bytearray(PAGE * 40))
slot[:] = bytes(range(256)) * (len(slot) // 256)  # gaps hold what was there before
for part, at in parts:
    slot[2 * PAGE + at : 2 * PAGE + at + part.numel()] = bytes(part.numpy())
records.finish(slot, Header(Kind.BASE, 3, 0, 0, 4, 2 * PAGE, 98_304), b"[0]" + bytes([10]))
sums = RecordSums(DeviceSums(device, chunk))
on_device = [(p.to(device), at) for p, at in parts]
taken = take(sums, sums.queue_records([Record(7, on_device, chunk=chunk)]))
assert {first: len(known) // 16 for first, known in taken[7].items()} == {0: 3, 4: 1}, taken
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
taken = take(sums, sums.queue_records([Record(7, [(log, 0)], [blocks], chunk), Record(8, [(other, 0)], (), chunk)]))
assert len(taken[7][0]) == 3 * 16, taken
assert records.checksum(slot, None, taken[7]) == records.checksum(slot)
assert taken[8] == {0: plainly(other, chunk)}

# More than there is room for: of what lies there the rest is left to the keeper, of what is added up nothing.
from checkpointing import device_sums
device_sums._MOST = 4
sums = RecordSums(DeviceSums(device, chunk))
long = torch.randint(0, 256, (3 * chunk,), dtype=torch.uint8).to(device)
given = [Record(n, [(long, 0)], (), chunk) for n in (1, 2, 3)]
given.insert(1, Record(7, [(log, 0)], [blocks], chunk))
found = take(sums, sums.queue_records(given))
assert {slot: len(of[0]) // 16 for slot, of in found.items()} == {1: 3, 7: 3, 2: 1}, found
assert found[7] == taken[7] and found[1][0] == plainly(long, chunk) and found[2][0] == found[1][0][:16]
print("equal")
"""


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@needs_triton
@pytest.mark.timeout(120)
def test_the_kernels_digests_are_the_librarys() -> None:
    _run_kernels({"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""})


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.timeout(120)
def test_the_digests_of_compiled_kernels_are_the_librarys() -> None:
    _run_kernels({"TRITON_INTERPRET": "0"})


def _run_kernels(more: dict[str, str]) -> None:
    command = [sys.executable, "-c", KERNELS]
    done = subprocess.run(command, env=os.environ | more, capture_output=True, text=True, timeout=100)
    assert done.stdout == "equal\nequal\n", done.stderr


class Without:
    """A device without room, or without a compiler."""

    asked = 0

    def queue(self, _: object) -> list[int]:
        self.asked += 1
        raise RuntimeError("CUDA out of memory\nand much more")


def test_a_device_that_cannot_leaves_all_sums_to_the_keeper(capsys: pytest.CaptureFixture[str]) -> None:
    device = Without()
    sums = RecordSums(device)  # type: ignore[arg-type]
    records = [Record(3, [(torch.zeros(4096, dtype=torch.uint8), 0)])]
    for _ in range(2):
        assert sums.take_records(sums.queue_records(records)) == {}
    assert device.asked == 1
    assert capsys.readouterr().err == "the GPU takes no checksums (CUDA out of memory); the keeper takes all\n"
