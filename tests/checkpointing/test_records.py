"""Records: only sealed and whole ones are believed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_128_digest

from checkpointing import records
from checkpointing.records import PAGE, Entry, Header, Kind, RecordError, State
from checkpointing.slots import EXTRAS_BYTES, ArenaShape, Pool
from checkpointing.units import Range

TABLE = (
    Entry(Range("L00.E001.up", "master", 0, 100), "float32", 0, 400),
    Entry(Range("L00.E001.up", "exp_avg", 0, 100), "float32", 512, 400),
)


def written(payload: bytes = bytes(range(256)) * 4) -> memoryview:
    record = memoryview(bytearray(4 * PAGE))
    records.begin(record)
    record[2 * PAGE : 2 * PAGE + len(payload)] = payload
    table = records.encode_table(TABLE, (2, 5))
    records.finish(record, Header(Kind.BASE, 7, 2, 40, len(table), 2 * PAGE, len(payload)), table)
    return record


def sealed() -> memoryview:
    record = written()
    records.seal(record)
    return record


def test_a_sealed_record_reads_back():
    record = sealed()
    header = records.verify(record)
    assert (header.kind, header.step, header.attempt, header.sequence) == (Kind.BASE, 7, 2, 40)
    assert records.table_of(record, header) == records.Table(TABLE, (2, 5))
    assert records.parts_of(record, header) == (2, 5)
    assert records.payload_of(record, header).tobytes() == bytes(range(256)) * 4


def test_zero_memory_is_free():
    assert records.state_of(memoryview(bytearray(PAGE))) is State.FREE


def test_only_sealed_records_are_believed():
    record = memoryview(bytearray(4 * PAGE))
    records.begin(record)
    with pytest.raises(RecordError, match="WRITING"):
        records.verify(record)
    with pytest.raises(RecordError, match="WRITING"):
        records.seal(record)
    with pytest.raises(RecordError, match="COPIED"):
        records.verify(written())


def test_taking_a_slot_voids_its_record_even_if_the_state_word_came_back():
    record = sealed()
    records.begin(record)
    records.set_state(record, State.SEALED)
    with pytest.raises(RecordError):
        records.verify(record)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_flipped_bit_is_detected(data):
    record = sealed()
    header = records.read_header(record)
    used = [*range(88), *range(PAGE, PAGE + header.table_bytes)]
    used += range(header.payload_offset, header.payload_offset + header.payload_bytes)
    at = data.draw(st.sampled_from(used))
    record[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(RecordError):
        records.verify(record)


def test_no_state_is_one_flip_from_sealed():
    assert all((state ^ State.SEALED).bit_count() > 8 for state in State if state is not State.SEALED)


def test_chunks_hash_to_the_same_in_parallel(monkeypatch):
    monkeypatch.setattr(records, "CHUNK", 100)
    monkeypatch.setattr(records, "_TOGETHER", 3)
    record = written()
    with ThreadPoolExecutor(3) as pool:
        assert records.checksum(record, pool) == records.checksum(record)


@given(st.data())
def test_digests_that_the_writer_took_stand_for_the_bytes_that_it_had(data):
    record, chunk = written(), 100
    header = records.read_header(record)
    whole, start = header.payload_bytes // chunk, header.payload_offset
    known = data.draw(st.lists(st.integers(0, whole - 1), unique=True))
    sums: dict[int, bytes] = {}
    for number in sorted(known):
        digest = xxh3_128_digest(record[start + number * chunk : start + (number + 1) * chunk])
        joined = next((first for first, run in sums.items() if first + len(run) // 16 == number), None)
        if joined is None or data.draw(st.booleans()):
            sums[number] = digest
        else:
            sums[joined] += digest
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "CHUNK", chunk)
        patch.setattr(records, "_TOGETHER", data.draw(st.integers(1, 4)))
        plain = records.checksum(record)
        assert records.checksum(record, None, sums) == plain
        for number in known:
            record[start + number * chunk] ^= 1
        assert records.checksum(record, None, sums) == plain, "they are not read again"
        assert not known or records.checksum(record) != plain


@pytest.mark.parametrize("sums", [{0: bytes(15)}, {0: bytes(32), 1: bytes(16)}, {-1: bytes(16)}, {2: bytes(17 * 1600)}])
def test_digests_that_fit_no_whole_chunks_are_refused(monkeypatch, sums):
    monkeypatch.setattr(records, "CHUNK", 100)
    with pytest.raises(RecordError, match="of digests"):
        records.checksum(written(), None, sums)


def test_a_record_too_large_for_its_slot_is_refused():
    record = memoryview(bytearray(4 * PAGE))
    table = records.encode_table(TABLE)
    with pytest.raises(RecordError, match="does not fit"):
        records.finish(record, Header(Kind.BASE, 7, 0, 0, len(table), 2 * PAGE, 2 * PAGE + 1), table)


pools = st.builds(Pool, st.integers(0, 5), st.integers(0, 50_000), st.integers(0, 50_000))


@given(pools, pools, st.integers(1, 5))
def test_slots_are_whole_pages_side_by_side(base, log, extras):
    shape = ArenaShape(base, log, extras)
    at = 0
    for slot in shape.slots():
        assert slot.offset == at
        assert at % PAGE == 0
        pool = {Kind.BASE: base, Kind.LOG: log}.get(slot.kind)
        assert slot.nbytes >= (pool.payload_offset + pool.payload_bytes if pool else EXTRAS_BYTES)
        at += slot.nbytes
    assert at == shape.nbytes
    kinds = [slot.kind for slot in shape.slots()]
    assert [kinds.count(kind) for kind in Kind] == [base.count, log.count, extras]
    assert ArenaShape.from_list(shape.as_list()) == shape
