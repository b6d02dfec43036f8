"""Capture from a GPU: a side stream, pinned shared memory, and the state of exactly the captured step."""

from __future__ import annotations

import pytest
import torch
from xxhash import xxh3_128_digest

from checkpointing.capture import Capturer
from checkpointing.keeper.client import KeeperClient
from checkpointing.pinning import Pinning
from checkpointing.protection import dense, wal
from checkpointing.record_sums import Record, RecordSums
from checkpointing.records import CHUNK
from checkpointing.recover import Recovery
from checkpointing.recovery import plan_recovery
from checkpointing.redo import Redo
from checkpointing.restore import Target
from checkpointing.state.buffers import StateBuffer, StateSpan
from checkpointing.state.gradients import StepLog, settings_of
from checkpointing.units import Range

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.drill,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_what_is_captured_is_the_state_at_the_start_and_it_restores(run_dir):
    elements = 40 << 20  # chunks of records lie in one buffer: the device takes their sums
    buffers = [
        StateBuffer(kind, torch.zeros(elements, device="cuda"), (StateSpan(Range("w", kind, 0, elements), 0),))
        for kind in ("master", "exp_avg")
    ]
    protection = dense(buffers, 3)
    client = KeeperClient.attach(run_dir, "dp0000", ["dp0000"], protection.shape, "0123456789abcdef")
    capturer = Capturer(client, buffers)
    work = torch.randn(4096, 4096, device="cuda")
    for step in range(1, 6):
        for buffer in buffers:
            # Queued behind slow work: the copy must wait for it, the host must not.
            for _ in range(10):
                work = torch.tanh(work @ work)
            buffer.tensor.fill_(step)
        capturer.start(step, {"rng": bytes([step])}, capturer.sealed_step, protection.fragments)
        capturer.hold()
        for buffer in buffers:
            buffer.tensor.fill_(-step)
    assert capturer.held_s() > 0
    assert capturer.held_s() == 0.0
    capturer.wait_sealed(5)
    client.close()
    capturer.close()
    client = KeeperClient.attach(run_dir, "dp0000", ["dp0000"], protection.shape, "0123456789abcdef", attempt=1)
    pinning = Pinning(client.arena, work.device)
    with Recovery(client, run_dir, Target(buffers, "dp0000", pinning=pinning)) as rank:
        plan = plan_recovery([rank.report()])
        assert plan.step == 5
        assert rank.apply(plan) == {"rng": b"\x05"}
    for buffer in buffers:
        assert torch.equal(buffer.tensor, torch.full_like(buffer.tensor, 5))
    pinned = [torch.frombuffer(view, dtype=torch.uint8).is_pinned() for view in client.arena.slots]
    assert sum(pinned) == 2  # the state and the extras of step 5
    pinning.pin_rest()
    pinning.close()
    client.close()


def logged_step(optimizer, flats, step):
    """One update, queued behind slow work as training queues it, and what it consumed."""
    from checkpointing.device_sums import scale_and_add

    log = StepLog([], [], [settings_of(g) | {"step": step - 1.0} for g in optimizer.param_groups])
    torch.cuda._sleep(20_000_000)
    for flat in flats:
        log.grads.append(torch.randn_like(flat).to(torch.bfloat16))
        log.ready.append(torch.cuda.current_stream().record_event())
        log.factors.append(torch.rand(1, device="cuda"))
        flat.grad = torch.empty_like(flat)
        log.sums.append(scale_and_add(log.grads[-1], log.factors[-1], flat.grad))
    optimizer.step()
    return log


def test_a_log_that_is_copied_while_the_step_goes_on_is_redone_exactly(run_dir, wait_until):
    """Everything is queued behind slow work, in the order in which training queues it."""
    torch.manual_seed(0)
    flats = [torch.nn.Parameter(torch.randn(numel, device="cuda")) for numel in (9_000_004, 3_000_000)]
    optimizer = torch.optim.AdamW([{"params": [flat]} for flat in flats], lr=1e-2, fused=True)
    for flat in flats:
        moments = {name: torch.zeros_like(flat.data) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[flat] = {"step": torch.zeros((), device="cuda"), **moments}
    buffers = [
        StateBuffer(f"group{i}.{kind}", tensor, (StateSpan(Range(f"w{i}", kind, 0, flat.numel()), 0),))
        for i, flat in enumerate(flats)
        for kind, tensor in [("master", flat.data), *list(optimizer.state[flat].items())[1:]]
    ]
    states = [buffer.tensor for buffer in buffers]
    protection = wal(buffers, 3, "bfloat16", False)
    client = KeeperClient.attach(
        run_dir, "dp0000", ["dp0000"], protection.shape, "0123456789abcdef", rules=protection.rules
    )
    capturer = Capturer(client, buffers, protection.log)
    capturer.start(0, {"rng": b"0"}, -1, protection.fragments)
    capturer.wait_copied()
    for step in range(1, 9):
        committed = capturer.sealed_step
        capturer.reserve(step, committed, log=True)
        log = logged_step(optimizer, flats, step)
        if step % 2:
            wait_until(lambda: capturer._reserved is not None)  # else it is found in time or late
        sizes = [(t.shape, t.dtype) for t in (*log.grads, *log.sums)]
        capturer.start(step, {"rng": bytes([step])}, committed, protection.due(step)[:1], log, least=1)
        capturer.hold()
        # The state changes at once, and is as it was; the log's memory is nobody's before it is copied.
        torch._foreach_mul_(states, 2.0)
        assert [torch.full(*size, 7, dtype=dtype, device="cuda") for *size, dtype in sizes]
        torch._foreach_mul_(states, 0.5)
    capturer.wait_sealed(8)
    lost = [buffer.tensor.clone() for buffer in buffers]
    for buffer in buffers:
        buffer.tensor.fill_(0.5)
    client.close()
    capturer.close()
    client = KeeperClient.attach(
        run_dir, "dp0000", ["dp0000"], protection.shape, "0123456789abcdef", rules=protection.rules, attempt=1
    )
    target = Target(buffers, "dp0000", Redo(optimizer), pinning=Pinning(client.arena, flats[0].device))
    with Recovery(client, run_dir, target) as rank:
        plan = plan_recovery([rank.report()])
        assert (plan.step, plan.tier) == (8, "memory")
        assert rank.apply(plan) == {"rng": b"\x08"}
    assert target.applied == [7, 8]
    assert all(torch.equal(buffer.tensor, was) for buffer, was in zip(buffers, lost, strict=True))
    target.pinning.close()
    client.close()


def test_a_training_step_that_reads_a_number_does_not_wait_for_the_capture(run_dir):
    elements = 512 << 20
    tensor = torch.ones(elements, device="cuda")
    buffers = [StateBuffer("master", tensor, (StateSpan(Range("w", "master", 0, elements), 0),))]
    protection = dense(buffers, 3)
    client = KeeperClient.attach(run_dir, "dp0000", ["dp0000"], protection.shape, "0123456789abcdef")
    number, others = torch.ones(1, device="cuda"), torch.cuda.Stream()
    all_was_copied = []

    def read(point: str, step: int) -> None:
        if point == "capture":  # all pieces are queued
            end = capturer._copies.stream.record_event()
            with torch.cuda.stream(others):
                number.item()
            all_was_copied.append(end.query())

    capturer = Capturer(client, buffers, reached=read)
    capturer._copies._sums = None  # kernels that come first would keep the copies from beginning
    for step in range(1, 4):
        capturer.start(step, {}, capturer.sealed_step, protection.fragments)
        capturer.wait_copied()
    assert all_was_copied == [False] * 3
    client.close()
    capturer.close()


def test_pinned_shared_memory_copies_as_fast_as_pinned_memory(run_dir):
    elements = 256 << 20
    tensor = torch.ones(elements, device="cuda")
    buffers = [StateBuffer("master", tensor, (StateSpan(Range("w", "master", 0, elements), 0),))]
    protection = dense(buffers, 3)
    client = KeeperClient.attach(run_dir, "dp0000", ["dp0000"], protection.shape, "0123456789abcdef")
    capturer = Capturer(client, buffers)
    capturer.pinning.pin(0)
    pinned = torch.empty(elements, pin_memory=True)

    def milliseconds(copy) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        copy()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    place = client.arena.places[0].offset + client.arena.shape.base.payload_offset
    shared = capturer._memory[place : place + 4 * elements].view(torch.float32)
    times = [
        (milliseconds(lambda: pinned.copy_(tensor, non_blocking=True)),
         milliseconds(lambda: shared.copy_(tensor, non_blocking=True)))
        for _ in range(5)
    ]  # fmt: skip
    ceiling, ours = (sorted(column)[2] for column in zip(*times, strict=True))
    print(f"pinned {4e-6 * elements / ceiling:.1f} GB/s, shared {4e-6 * elements / ours:.1f} GB/s")
    assert ours < 1.2 * ceiling
    client.close()
    capturer.close()


def test_gradients_are_scaled_as_torch_scales_them_and_their_sums_are_those_of_the_log():
    from checkpointing.device_sums import DeviceSums, scale_and_add

    chunks, rest = 30, 27_136
    flat = torch.randn(chunks * CHUNK // 2 + rest, device="cuda").to(torch.bfloat16)
    factor = torch.tensor([0.73], device="cuda")
    grad = flat.float()
    blocks = scale_and_add(flat, factor, grad)
    assert torch.equal(grad, flat.float().mul_(factor))
    state = torch.randn(2 * CHUNK // 4, device="cuda")
    sums = RecordSums(DeviceSums(flat.device, CHUNK))
    records = [Record(7, [(flat.view(torch.uint8), 0)], [blocks]), Record(8, [(state.view(torch.uint8), 0)])]
    runs = sums.queue_records(records)
    torch.cuda.synchronize()
    taken = sums.take_records(runs)
    for slot, tensor, count in ((7, flat, chunks), (8, state, 2)):
        plain = tensor.view(torch.uint8).cpu().numpy().tobytes()
        each = [xxh3_128_digest(plain[number * CHUNK : (number + 1) * CHUNK]) for number in range(count)]
        assert taken[slot] == {0: b"".join(each)}
