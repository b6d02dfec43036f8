from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from inference import banks
from inference.banks import STAGING_BUFFERS, ExpertBanks, check_memory
from inference.errors import InferenceError
from inference.expert_block import ExpertBlock, ExpertShape
from inference.packed import PackedBlock, unpack
from inference.store import ExpertStore, TensorFiles
from moe.refs import ExpertRef
from tests.inference.linked import Registry

SHAPE = ExpertShape(16, 64, 32)


@pytest.fixture
def store(model_folder):
    return ExpertStore(TensorFiles(model_folder), {n: f"model.layers.{n}.mlp.experts" for n in range(4)}, SHAPE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_experts_end_up_in_registered_arenas_of_just_their_size(store, dtype):
    layout, registry = ExpertBlock(SHAPE, dtype), Registry()
    filled = ExpertBanks(store, layout, registry)
    filled.join()
    assert filled.ready_share == 1
    assert sorted(registry.live.values()) == [STAGING_BUFFERS * layout.nbytes] + 4 * [16 * layout.nbytes]
    for ref in (ExpertRef(0, 0), ExpertRef(3, 15), ExpertRef(2, 7)):
        block_B = filled.block(ref)
        assert any(start <= block_B.data_ptr() < start + nbytes for start, nbytes in registry.live.items())
        expected = torch.zeros(layout.elements, dtype=dtype)
        store.read(ref.layer, ref.expert, layout, expected)
        assert torch.equal(block_B, expected)
        assert filled.address(ref) == block_B.data_ptr()
        assert torch.equal(filled.stacked(ref.layer)[1][ref.expert], layout.split(block_B)[1])
    filled.close()
    assert not registry.live


def test_packed_banks_hold_each_weight_in_twelve_bits(store):
    layout, registry = ExpertBlock(SHAPE, torch.bfloat16), Registry()
    filled = ExpertBanks(store, layout, registry, packed=True)
    filled.join()
    stride = PackedBlock(layout.elements).stride
    assert filled.nbytes == 64 * stride < 64 * layout.nbytes
    assert sorted(registry.live.values()) == [STAGING_BUFFERS * layout.nbytes] + 4 * [16 * stride]
    for ref in (ExpertRef(0, 0), ExpertRef(3, 15), ExpertRef(2, 7)):
        packed_N = filled.block(ref)
        assert filled.packed(ref.layer)
        assert 1.5 * layout.elements < len(packed_N) < 0.8 * layout.nbytes
        expected = torch.zeros(layout.elements, dtype=torch.bfloat16)
        store.read(ref.layer, ref.expert, layout, expected)
        assert torch.equal(unpack(packed_N, layout.elements), expected)
        assert filled.address(ref) == packed_N.data_ptr()
        assert filled.address(ref) % 64 == 0
    filled.close()


@pytest.fixture
def wild(store, monkeypatch):
    """The store, with an expert in layer 2 that cannot be packed."""
    read = store.read

    def read_wild(layer, expert, layout, block_B):
        read(layer, expert, layout, block_B)
        if (layer, expert) == (2, 5):
            block_B[::9] = 2.0 ** (torch.arange(len(block_B[::9])) % 99 - 50)

    monkeypatch.setattr(store, "read", read_wild)
    return store


def test_a_layer_with_an_expert_that_cannot_be_packed_stays_as_it_is_and_it_is_said(wild, caplog):
    store, layout = wild, ExpertBlock(SHAPE, torch.bfloat16)
    filled = ExpertBanks(store, layout, Registry(), packed=True)
    filled.join()
    assert [filled.packed(layer) for layer in store.layers] == [True, True, False, True]
    assert "L02.E005 and perhaps others" in caplog.text
    expected = torch.zeros(layout.elements, dtype=torch.bfloat16)
    store.read(2, 5, layout, expected)
    assert torch.equal(filled.block(ExpertRef(2, 5)), expected)
    assert filled.address(ExpertRef(2, 5)) == filled.block(ExpertRef(2, 5)).data_ptr()
    filled.close()


def test_without_memory_for_a_layer_that_cannot_be_packed_it_is_named_with_what_is_left_to_fill(wild, monkeypatch):
    """By then the memory in which it was to be packed is given back."""
    layout, given_back, asked = ExpertBlock(SHAPE, torch.bfloat16), threading.Event(), []
    made = banks.mmap.mmap
    packed_bytes = 16 * PackedBlock(layout.elements).stride

    def mapping(number, nbytes):
        memory = made(number, nbytes)
        if nbytes == packed_bytes:
            given_back.clear()
            weakref.finalize(memory, given_back.set)
        return memory

    def available():
        asked.append(len(asked) == 0 or given_back.wait(5))
        return 1 << 30 if len(asked) == 1 else 12_345

    monkeypatch.setattr(banks.mmap, "mmap", mapping)
    monkeypatch.setattr(banks, "available_bytes", available)
    filling = ExpertBanks(wild, layout, Registry(), packed=True)
    needed = 16 * layout.nbytes + packed_bytes
    said = rf"for layer 2, which cannot be packed, and those behind it takes {needed:,} bytes.* 12,345 .*--no-pin"
    with pytest.raises(InferenceError, match=said):
        filling.join()
    assert asked == [True, True]


def test_banks_that_are_closed_while_they_fill_pack_nothing_that_was_not_read(store, monkeypatch, caplog):
    class Closed(threading.Event):
        """From its second look on, whoever looks."""

        looks = 0

        def is_set(self):
            self.looks += 1
            return self.looks > 1

    layout, packed, read = ExpertBlock(SHAPE, torch.bfloat16), [], store.read
    done = []
    monkeypatch.setattr(store, "read", lambda *given: done.append(given[1]) or read(*given))
    monkeypatch.setattr(banks, "pack_into", lambda *given: packed.append(1) or 0)
    with ThreadPoolExecutor(1) as pool:
        banks._packed_layer(banks._Shared(Registry(), Closed()), pool, store, layout, 1)
    assert len(packed) == len(done) == 1
    assert "L01.E000 and perhaps others" in caplog.text


def test_what_is_registered_is_given_back_when_the_banks_are_dropped(store):
    registry = Registry()
    filled = ExpertBanks(store, ExpertBlock(SHAPE, torch.float32), registry)
    filled.join()
    assert len(registry.live) == 5
    del filled
    gc.collect()
    assert not registry.live


def test_serving_begins_before_all_is_registered(store):
    """The second layer's registration is held up: the first comes from its bank, the others are staged."""
    allow, reached = threading.Event(), threading.Event()

    class Slow(Registry):
        def register(self, address, nbytes):
            if len(self.live) == 2:
                reached.set()
                assert allow.wait(20)
            super().register(address, nbytes)

    layout = ExpertBlock(SHAPE, torch.float32)
    filling = ExpertBanks(store, layout, Slow())
    assert reached.wait(20)
    assert filling.ready_share == 0.25
    assert filling.block(ExpertRef(0, 3)) is not None
    assert filling.block(ExpertRef(1, 3)) is None
    block_B, release = filling.staged(ExpertRef(1, 3), settle=None)
    assert torch.equal(layout.split(block_B)[1], store.views(1, 3)[2])
    release(0.0)
    allow.set()
    filling.join()
    assert filling.block(ExpertRef(1, 3)) is not None
    filling.close()


def test_staging_buffers_take_turns_and_wait_for_their_own_copy(store):
    filling = ExpertBanks(store, ExpertBlock(SHAPE, torch.float32), Registry(), start=False)
    settled, addresses = [], []
    for number in range(STAGING_BUFFERS + 2):
        block_B, release = filling.staged(ExpertRef(0, number), settled.append)
        release(number)
        addresses.append(block_B.data_ptr())
    assert len(set(addresses)) == STAGING_BUFFERS
    assert settled == [0, 1]


def test_an_error_while_filling_reaches_the_one_who_serves(store, monkeypatch):
    def torn(layer, expert, layout, block_B):
        raise InferenceError(f"L{layer:02}.E{expert:03}.gate_up_proj: tensor x: f: ends before byte 9")

    monkeypatch.setattr(store, "read", torn)
    filling = ExpertBanks(store, ExpertBlock(SHAPE, torch.float32), Registry())
    filling._shared.thread.join()
    with pytest.raises(InferenceError, match=r"L00\.E000\.gate_up_proj.*ends before byte 9"):
        filling.block(ExpertRef(3, 3))


def test_a_refused_registration_says_what_there_is(store):
    filling = ExpertBanks(store, ExpertBlock(SHAPE, torch.float32), Registry(refuse_after=3))
    filling._shared.thread.join()
    with pytest.raises(InferenceError, match=r"for layer 2: cudaHostRegister failed.*available, RLIMIT_MEMLOCK is"):
        filling.block(ExpertRef(0, 0))
    with pytest.raises(InferenceError, match="staging buffers"):
        ExpertBanks(store, ExpertBlock(SHAPE, torch.float32), Registry(refuse_after=0))


def test_too_little_memory_is_refused_with_both_figures(store, monkeypatch):
    check_memory(1, "one byte")
    monkeypatch.setattr(banks, "available_bytes", lambda: 1_500_000)
    needed = 64 * ExpertBlock(SHAPE, torch.float32).nbytes
    with pytest.raises(InferenceError, match=rf"for all experts takes {needed:,} bytes.*1,500,000 .*--no-pin"):
        ExpertBanks(store, ExpertBlock(SHAPE, torch.float32), Registry())


def test_banks_that_are_collected_in_one_of_their_own_threads_do_not_wait_for_it(store, monkeypatch):
    layout, read, closing = ExpertBlock(SHAPE, torch.bfloat16), store.read, threading.Event()
    opened: list[ExpertBanks] = []

    def reading(*args):
        closing.wait(20)
        if opened:
            opened.pop()._finalizer()  # as the garbage collector may, in whatever thread it comes to be
        return read(*args)

    monkeypatch.setattr(store, "read", reading)
    registry = Registry()
    opened.append(ExpertBanks(store, layout, registry))
    thread = opened[0]._shared.thread
    closing.set()
    thread.join(20)
    assert not thread.is_alive()
