"""Redo gives the bits of the live run, for every optimizer that may be logged, and refuses what does not fit."""

from __future__ import annotations

import json

import pytest
import torch

from checkpointing.recovery import RecoveryError
from checkpointing.redo import LoggedStep, Redo, redo_steps
from checkpointing.state.gradients import LogError, StepLog, check_elementwise, settings_of
from checkpointing.state.optimizers import Lion

SIZES = (1003, 64)  # a vector's tail, and none


def adamw(groups):
    return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1, fused=True), ("exp_avg", "exp_avg_sq"), True


def adamw_unfused(groups):
    return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1), ("exp_avg", "exp_avg_sq"), True


def sgd(groups):
    return torch.optim.SGD(groups, lr=1e-2, momentum=0.9, fused=True), ("momentum_buffer",), False


def lion(groups):
    return Lion(groups, weight_decay=0.1), ("exp_avg",), True


def build(make):
    torch.manual_seed(3)
    flats = [torch.nn.Parameter(torch.randn(size)) for size in SIZES]
    optimizer, moments, counts = make([{"params": [flat]} for flat in flats])
    for flat in flats:
        optimizer.state[flat] = {name: torch.zeros_like(flat.data) for name in moments}
        if counts:
            optimizer.state[flat]["step"] = torch.zeros(())
    return optimizer, flats


def run(optimizer, flats, steps, dtype):
    """Live steps as ZeRO takes them; returns the log of each and copies of the state after each."""
    logs, states = [], []
    for step in range(1, steps + 1):
        torch.manual_seed(step)
        grads = [torch.randn(flat.numel()).to(dtype) for flat in flats]
        factors = [torch.tensor([0.37 * step])] * len(flats) if dtype != torch.float32 else []
        groups = []
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / step
            groups.append(settings_of(group) | {"step": step - 1.0})
        log = StepLog(grads, factors, groups)
        for i, flat in enumerate(flats):
            flat.grad = grads[i].float() if dtype == torch.float32 else grads[i].float().mul_(factors[i])
        for group in list(optimizer.param_groups):  # one group at a time, as DeepSpeed does
            every, optimizer.param_groups = optimizer.param_groups, [group]
            optimizer.step()
            optimizer.param_groups = every
        kept = [grad.clone() for grad in grads]
        name = str(dtype).removeprefix("torch.")
        logs.append(
            LoggedStep(
                log.meta([float(f) for f in factors]), name, lambda index, into, kept=kept: into.copy_(kept[index])
            )
        )
        states.append(snapshot(optimizer, flats))
    return logs, states


def snapshot(optimizer, flats):
    return [t.detach().clone() for flat in flats for t in (flat, *optimizer.state[flat].values())]


@pytest.mark.parametrize("make", [adamw, adamw_unfused, sgd, lion])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_redo_from_any_step_gives_the_live_bits(make, dtype):
    logs, states = run(*build(make), 6, dtype)
    for first in (0, 2, 5):
        optimizer, flats = build(make)
        if first:
            restored = iter(states[first - 1])
            for flat in flats:
                for tensor in (flat.data, *optimizer.state[flat].values()):
                    tensor.copy_(next(restored))
        redo_steps(Redo(optimizer), first, logs[first:], lambda step: None)
        assert all(torch.equal(a, b) for a, b in zip(snapshot(optimizer, flats), states[-1], strict=True))
        assert all(flat.grad is None for flat in flats)


def test_a_gap_in_the_log_is_noticed_by_the_optimizers_own_count():
    logs, _ = run(*build(adamw), 3, torch.float32)
    redo = Redo(build(adamw)[0])
    redo.begin(logs[0])
    redo.apply(1, logs[0])
    with pytest.raises(
        RecoveryError, match="log of step 3 was written after 2 optimizer steps of group 0, 1 are applied"
    ):
        redo.apply(3, logs[2])


def test_a_log_of_other_groups_is_refused():
    logs, _ = run(*build(adamw), 1, torch.float32)
    facts = json.loads(logs[0].meta)
    facts["groups"] = facts["groups"][:1]
    with pytest.raises(RecoveryError, match="has 1 groups, not 2"):
        Redo(build(adamw)[0]).apply(1, LoggedStep(json.dumps(facts).encode(), "float32", logs[0].read))


def test_an_optimizer_that_mixes_elements_is_refused_by_name():
    for make in (adamw, sgd, lion):
        check_elementwise(build(make)[0])
    with pytest.raises(LogError, match="Adafactor does not allow; choose AdamW, SGD or Lion"):
        check_elementwise(torch.optim.Adafactor([torch.nn.Parameter(torch.zeros(3))]))


def test_lion_follows_the_papers_algorithm():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(50))
    expected, moment = weight.detach().double(), torch.zeros(50, dtype=torch.float64)
    optimizer = Lion([weight], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    for _ in range(5):
        weight.grad = torch.randn(50)
        grad = weight.grad.double()
        expected -= 1e-2 * (torch.sign(0.9 * moment + 0.1 * grad) + 0.1 * expected)
        moment = 0.99 * moment + 0.01 * grad
        optimizer.step()
    torch.testing.assert_close(weight.detach().double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(optimizer.state[weight]["exp_avg"].double(), moment, rtol=1e-5, atol=1e-6)
    assert optimizer.state[weight]["step"] == 5
