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


def take(sums, *given):
    if device.type == "cuda":
        torch.cuda.current_stream().synchronize()
    return (sums.take if isinstance(sums, DeviceSums) else sums.take_records)(*given)


def plainly(tensor, chunk):
    plain = bytes(tensor.cpu().numpy())
    return b"".join(xxh3_128_digest(plain[at : at + chunk]) for at in range(0, len(plain), chunk))


for blocks in (16, 32, 48, 64):
    chunk = 1024 * blocks
    torch.manual_seed(blocks)
    data = [torch.randint(0, 256, (n * chunk,), dtype=torch.uint8, device=device) for n in (3, 1, 2)]
    sums = DeviceSums(device, chunk)
    for _ in range(2):
        sums.queue([Chunks(d.data_ptr(), d.numel() // chunk) for d in data])
        assert take(sums) == [plainly(d, chunk) for d in data], blocks
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

# Groups of a log, wherever the second one begins: what is taken is right, and a group's sums only where blocks agree.
first, second = (torch.randn(n, device=device).to(torch.bfloat16) for n in (26_628, 40_000))
pairs = [(t.view(torch.uint8), scale_and_add(t, factor, t.float())) for t in (first, second)]
for offset in (53_256 + 8, 54_272, 55_296, 55_552, 70_656):
    payload = torch.zeros(offset + 80_000, dtype=torch.uint8, device=device)
    parts = [(pairs[0][0], 0), (pairs[1][0], offset)]
    for part, at in parts:
        payload[at : at + part.numel()] = part
    record = Record(1, parts, [sums for _, sums in pairs], chunk)
    taken_there = [chunks.sums is not None for _, chunks in record.runs]
    assert taken_there == [True, offset % 1024 == 0][: len(taken_there)], taken_there
    found = take(sums, sums.queue_records([record]))[1]
    for at, known in found.items():
        count = len(known) // 16
        assert known == plainly(payload[at * chunk : (at + count) * chunk], chunk), (offset, at)
    assert (len(found) == 2) == (offset % 16 == 0)

# More than are summed up at once, and more than there was room for.
from checkpointing import device_sums
device_sums._MOST = 4
sums = RecordSums(DeviceSums(device, chunk))
long = torch.randint(0, 256, (7 * chunk,), dtype=torch.uint8).to(device)
for some in ((1, 2), (2, 3, 1), (1,)):
    given = [Record(n, [(long[: n * 3 * chunk], 0)], (), chunk) for n in some]
    given.insert(1, Record(7, [(log, 0)], [blocks], chunk))
    found = take(sums, sums.queue_records(given))
    assert found.pop(7) == taken[7]
    assert found == {n: {0: plainly(long, chunk)[: min(n * 3, 7) * 16]} for n in some}
assert sums._failed is None and take(sums, sums.queue_records([])) == {}
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

    def queue(self, _: object) -> None:
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
