"""The link of a real GPU: page-locked banks, copies on a stream of their own, and the same bits as all resident."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import silu

from inference.banks import CudaRegistrar, ExpertBanks
from inference.cache import ExpertCache
from inference.cuda_link import CudaLink
from inference.engine import LLM
from inference.errors import InferenceError
from inference.executor import Executor
from inference.expert_block import ExpertBlock, ExpertShape
from inference.experts import OffloadedExperts
from inference.layer_stream import LayerStream
from inference.offload import Crossing
from inference.packed import unpack
from inference.predictors import PREDICTORS, SameAsLast
from inference.prefetch import Prefetcher
from inference.rows import computing
from inference.store import ExpertStore, TensorFiles
from inference.transfer import TransferEngine, Urgency
from moe.refs import ExpertRef
from tests.inference.test_engine import FAMILIES, tiny
from tests.inference.test_executor import batch
from tests.inference.test_hybrid import EVEN
from tests.inference.test_layer_stream import rows_of
from tests.inference.test_phases import WAYS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SHAPE = ExpertShape(16, 64, 32)


@pytest.fixture
def store(model_folder):
    return ExpertStore(TensorFiles(model_folder), {n: f"model.layers.{n}.mlp.experts" for n in range(4)}, SHAPE)


@pytest.fixture
def device():
    return torch.device("cuda", torch.cuda.current_device())


@pytest.mark.parametrize("way", ["staged", "pinned", "packed"])
def test_an_expert_crosses_whole_while_the_device_is_busy(store, device, way):
    layout = ExpertBlock(SHAPE, torch.bfloat16)
    banks = ExpertBanks(store, layout, CudaRegistrar(device), start=way != "staged", packed=way == "packed")
    banks.join()
    transfers = TransferEngine(CudaLink(device), banks, chunk_bytes=1024, window_bytes=4096)
    targets = torch.full((16, layout.elements), float("nan"), dtype=torch.bfloat16, device=device)
    transfers.link.fence()  # or the NaN may come last: copies do not wait for what is computed
    busy = torch.randn(4096, 4096, device=device)
    for _ in range(20):
        busy = busy @ busy * 1e-3
    sent = [transfers.demand(ExpertRef(1, e), targets[e]) for e in range(8)]
    sent += [transfers.prefetch(ExpertRef(1, e), targets[e], Urgency.NEXT) for e in range(8, 16)]
    transfers.pump()
    transfers.wait(sent)
    copied = targets.clone()  # on the stream that computes: behind the copies
    expected = torch.zeros(layout.elements, dtype=torch.bfloat16)
    for expert in range(16):
        store.read(1, expert, layout, expected)
        assert torch.equal(copied[expert].cpu(), expected)
    assert all(transfers.arrived(one) for one in sent)
    assert transfers.link.stall_s >= 0
    if way == "packed":
        counts = transfers.counts
        assert counts.demanded_bytes + counts.prefetched_bytes == sum(banks.block(one.ref).nbytes for one in sent)
    banks.close()


def test_packed_and_plain_layers_share_a_link(store, device, monkeypatch):
    """A mark is behind all that was given before it, on whichever stream it arrives."""
    layout = ExpertBlock(SHAPE, torch.bfloat16)
    read, refused = store.read, torch.zeros(layout.elements, dtype=torch.bfloat16)
    refused[::9] = 2.0 ** (torch.arange(len(refused[::9])) % 99 - 50)

    def wild(layer, expert, layout, block_B):
        read(layer, expert, layout, block_B)
        if layer == 1:
            block_B[::9] = refused[::9]

    monkeypatch.setattr(store, "read", wild)
    banks = ExpertBanks(store, layout, CudaRegistrar(device), packed=True)
    banks.join()
    assert [banks.packed(layer) for layer in range(4)] == [True, False, True, True]
    transfers = TransferEngine(CudaLink(device), banks)
    expected = torch.zeros(layout.elements, dtype=torch.bfloat16)
    for turn in range(3):
        targets = torch.full((12, layout.elements), float("nan"), dtype=torch.bfloat16, device=device)
        transfers.link.fence()
        refs = [ExpertRef((turn + number) % 4, number) for number in range(12)]
        wanted = list(zip(refs, targets, strict=True))
        sent = [t for part in (wanted[:1], wanted[1:6], wanted[6:]) for t in transfers.demand_all(part)]
        transfers.wait(sent[:1])
        first = targets[0].clone()
        transfers.wait(sent)
        copied = targets.clone()
        assert torch.equal(first, copied[0])
        for ref, got in zip(refs, copied, strict=True):
            store.read(ref.layer, ref.expert, layout, expected)
            assert torch.equal(got.cpu(), expected), (turn, ref)
    banks.close()


def test_the_last_copy_into_a_block_is_the_one_that_stays(store, device):
    """Though it is a plain one, behind a packed one that is unpacked late."""
    layout = ExpertBlock(SHAPE, torch.bfloat16)
    banks = ExpertBanks(store, layout, CudaRegistrar(device), packed=True)
    banks.join()
    link, target_B = CudaLink(device), torch.zeros(layout.elements, dtype=torch.bfloat16, device=device)
    plain_B = torch.ones(layout.elements, dtype=torch.bfloat16).pin_memory()
    link.copy(target_B, banks.block(ExpertRef(0, 0)))
    with torch.cuda.stream(link._ring.unpacking):
        torch.cuda._sleep(50_000_000)
    for first, last in ((banks.block(ExpertRef(0, 1)), plain_B), (plain_B, banks.block(ExpertRef(0, 1)))):
        link.copy(target_B, first)
        link.copy(target_B, last)
        link.settle(link.mark())
        expected = plain_B if last is plain_B else unpack(last, layout.elements)
        assert torch.equal(target_B.cpu(), expected)
    banks.close()


def test_a_ring_is_not_written_over_while_unpacking_stands_still(store, device):
    layout = ExpertBlock(SHAPE, torch.bfloat16)
    banks = ExpertBanks(store, layout, CudaRegistrar(device), packed=True)
    banks.join()
    link, refs = CudaLink(device), [ExpertRef(layer, expert) for layer in range(3) for expert in range(16)]
    targets = torch.full((len(refs), layout.elements), float("nan"), dtype=torch.bfloat16, device=device)
    link.fence()
    link.copy(targets[0], banks.block(refs[0]))
    assert len(refs) > 4 * link._ring._count
    with torch.cuda.stream(link._ring.unpacking):
        torch.cuda._sleep(100_000_000)  # far longer than all of them take to cross
    for ref, target_B in zip(refs[1:], targets[1:], strict=True):
        link.copy(target_B, banks.block(ref))
    mark = link.mark()
    assert not link.done(mark)
    link.settle(mark)
    for ref, got_B in zip(refs, targets.cpu(), strict=True):
        block = banks.block(ref)
        assert torch.equal(got_B, unpack(block, layout.elements)), ref
    banks.close()


@pytest.mark.timeout(60, method="thread")
@torch.inference_mode()
def test_giving_up_frees_what_waits_for_the_host(device):
    from inference.decode_experts import HostCount

    count, other = HostCount(device), torch.cuda.Stream(device)
    for _ in range(2):
        for _ in range(3):
            count.wait()
        held = torch.cuda.Event()
        held.record()
        with torch.cuda.stream(other):  # long enough for a kernel that does not wait to be over
            torch.cuda._sleep(20_000_000)
        other.synchronize()
        count.done_1[0] += 1
        assert not held.query()
        count.give_up()
        assert held.query()
        assert int(count.done_1[0]) == 0
    count.wait()
    last = torch.cuda.Event()
    last.record()
    count.done_1[0] += 1
    last.synchronize()


def test_page_locked_memory_can_be_given_back_and_locked_again(store, device):
    for _ in range(2):
        banks = ExpertBanks(store, ExpertBlock(SHAPE, torch.float32), CudaRegistrar(device))
        banks.join()
        assert banks.block(ExpertRef(3, 15)).is_pinned()
        banks.close()


def test_a_refused_registration_is_a_sentence(device):
    registrar = CudaRegistrar(device)
    with pytest.raises(RuntimeError, match="cudaHostRegister failed with CUDA error"):
        registrar.register(4096, 4096)
    assert torch.ones(4, device=device).sum() == 4, "the error is nobody else's"


def linked(store, device, slots, dtype, *, kernels, prefetch=False, packed=False, many_pairs=64):
    cache = ExpertCache(store, slots, device=device, dtype=dtype, poison=True)
    banks = ExpertBanks(store, cache.layout, CudaRegistrar(device), packed=packed)
    transfers = TransferEngine(CudaLink(device), banks, chunk_bytes=4096, window_bytes=16384)
    prefetcher = Prefetcher(SameAsLast(4, 16, 4, lead=2), cache, transfers) if prefetch else None
    stream = LayerStream(cache, transfers) if slots < store.total else None
    slot_calls = None
    if kernels:
        from inference.slot_calls import SlotCalls

        slot_calls = SlotCalls(cache)
    executor = Executor(
        cache, transfers, prefetcher=prefetcher, stream=stream, slot_calls=slot_calls, many_pairs=many_pairs
    )
    return {layer: OffloadedExperts(cache, layer, silu, executor) for layer in store.layers}


@torch.inference_mode()
@pytest.mark.parametrize(("dtype", "packed"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
@pytest.mark.parametrize("kernels", [False, True], ids=["products", "kernels"])
@pytest.mark.parametrize("prefetch", [False, True], ids=["demand", "prefetch"])
@pytest.mark.parametrize("slots", [0, 1, 6, 16])
def test_bits_do_not_depend_on_what_is_resident(store, device, slots, prefetch, kernels, dtype, packed):
    resident = linked(store, device, 64, dtype, kernels=kernels)
    some = linked(store, device, slots, dtype, kernels=kernels, prefetch=prefetch, packed=packed)
    for number in range(12):
        tokens = (1, 1, 3, 40)[number % 4]
        for layer in range(4):
            x, index, scores = batch(tokens, 10 * number + layer, sticky=True)
            call = (x.to(device, dtype), index.to(device), scores.to(device, dtype))
            expected, got = resident[layer](*call), some[layer](*call)
            assert torch.equal(got, expected), (number, layer)
            assert got.isfinite().all()
            with computing(rows_of(*[1] * tokens)):  # the same rows, decoded
                assert torch.equal(some[layer](*call), expected), (number, layer)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_logits_of_every_family_have_the_same_bits_at_every_budget(family, tmp_path):
    tiny(family, **FAMILIES[family]).save_pretrained(tmp_path)
    prompt = torch.randint(1, 96, (40,), generator=torch.Generator().manual_seed(2)).tolist()
    expected = None
    for budget in (1.0, 0.0, 0.1, 0.25):
        llm = LLM(tmp_path, budget, device="cuda", poison=True, crossing=Crossing("next_gate"))
        llm.executor.many_pairs = 32
        for _ in range(2):
            logits = [llm.logits(prompt), llm.logits(prompt[:3])]
            expected = expected or logits
            assert all(torch.equal(a, b) for a, b in zip(logits, expected, strict=True)), budget


@pytest.mark.parametrize("prefetch", [name for name in PREDICTORS if name != "heads"])
def test_texts_are_the_same_whatever_is_prefetched(model_folder, prompts, prefetch):
    plain = [g.token_ids for g in LLM(model_folder, 1.0, device="cuda").generate(prompts[:4], 24)]
    llm = LLM(model_folder, 0.25, device="cuda", poison=True, crossing=Crossing(prefetch))
    assert [g.token_ids for g in llm.generate(prompts[:4], 24)] == plain


def test_texts_are_the_same_packed_or_not(model_folder, prompts):
    """Through captured steps, too."""
    plain = LLM(model_folder, 1.0, device="cuda", dtype=torch.bfloat16)
    expected = [generation.token_ids for generation in plain.generate(prompts[:2], 24)]
    for pack in (False, True):
        crossing = Crossing(pack=pack)
        with LLM(model_folder, 0.25, device="cuda", dtype=torch.bfloat16, poison=True, crossing=crossing) as llm:
            source = llm.executor.transfers.source
            source.join()
            assert source.packs == pack
            assert [generation.token_ids for generation in llm.generate(prompts[:2], 24)] == expected


def test_the_cpu_lane_is_close(model_folder, prompts):
    plain = LLM(model_folder, 1.0, device="cuda").logits(prompts[4])
    llm = LLM(model_folder, 0.1, device="cuda", poison=True, crossing=Crossing(cpu=True))
    torch.testing.assert_close(llm.logits(prompts[4]), plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_prompts_go_the_way_that_is_printed(model_folder, way):
    prompt = torch.randint(1, 512, (200,), generator=torch.Generator().manual_seed(3)).tolist()
    plain = LLM(model_folder, 1.0, device="cuda").logits(prompt)
    for budget in (0.0, 0.25):
        with LLM(
            model_folder, budget, device="cuda", poison=True, crossing=Crossing(cpu=True, profile=WAYS[way])
        ) as llm:
            for _ in range(2):
                logits = llm.logits(prompt)
                torch.testing.assert_close(logits, plain, rtol=1e-3, atol=1e-3)
                assert way != "stream" or torch.equal(logits, plain)
            measured = llm.report(EVEN).measured
            ways = measured.pass_ways
            assert ways == {way: 2} or (way == "split" and ways == {"split": 1, "cpu": 1}), "one miss cannot be split"
            assert (measured.cpu_experts > 0, measured.fetched_bytes > 0) == (way != "stream", way != "cpu")


def test_too_little_host_memory_is_refused_before_anything_is_locked(model_folder, monkeypatch):
    monkeypatch.setattr("inference.banks.available_bytes", lambda: 1000)
    with pytest.raises(InferenceError, match=r"1,000 .*are available.*--no-pin"):
        LLM(model_folder, 0.25, device="cuda")
    LLM(model_folder, 0.25, device="cuda", crossing=Crossing(pin=False)).generate([[1, 2, 3]], 4)
