"""Expert LoRA against one token at a time in fp64: outputs, every gradient, three optimizer steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lora.config import BankConfig
from lora.experts import ExpertLoRA, ExpertSlice
from lora.factors import FactoredDelta
from lora.presets import bank_at
from moe.convert import convert
from moe.layout import Layout

HIDDEN, INTERMEDIATE, EXPERTS = 12, 7, 6
FACTORS = {"gate_up_proj": (4, 6.0), "down_proj": (3, 5.0)}


def make(first: int = 0, local: int = EXPERTS, ep: int = 1, factors=None, **place) -> ExpertLoRA:
    part = ExpertSlice(3, EXPERTS, first, local, ep)
    path = "model.layers.3.mlp.experts.adapter"
    adapter = ExpertLoRA(path, part, HIDDEN, INTERMEDIATE)
    for name, (r, alpha) in (factors or FACTORS).items():
        adapter.add(name, bank_at(BankConfig("expert-lora", r=r, alpha=alpha), 0, 1), **place)
    return adapter


def randomize(module: torch.nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3, generator=generator)


def naive_delta(x: Tensor, a: Tensor, b: Tensor, counts: list[int], scale: float) -> Tensor:
    rows, n = [], 0
    for expert, count in enumerate(counts):
        for _ in range(count):
            rows.append((scale * b[expert] @ a[expert]) @ x[n])
            n += 1
    return torch.stack(rows)


@pytest.mark.parametrize("counts", [[3, 0, 5, 1, 0, 2], [0, 0, 0, 0, 0, 4], [1, 1, 1, 1, 1, 1]])
def test_deltas_and_all_gradients_match_one_row_at_a_time_over_three_steps(counts):
    fast, slow = make(dtype=torch.float64), make(dtype=torch.float64)
    randomize(fast)
    slow.load_state_dict(fast.state_dict())
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.05) for m in (fast, slow)]
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        x, a = (
            torch.randn(sum(counts), width, dtype=torch.float64, generator=generator)
            for width in (HIDDEN, INTERMEDIATE)
        )
        inputs = [[t.clone().requires_grad_() for t in (x, a)] for _ in range(2)]
        counts_L = torch.tensor(counts)
        got = fast.gate_up_delta(inputs[0][0], counts_L), fast.down_delta(inputs[0][1], counts_L)
        want = tuple(
            naive_delta(t, stack.A, stack.B, counts, stack.scale)
            for t, stack in zip(inputs[1], (slow.gate_up_proj, slow.down_proj), strict=True)
        )
        for optimizer, outputs in zip(optimizers, (got, want), strict=True):
            optimizer.zero_grad()
            sum((y.sin() * (i + 1)).sum() for i, y in enumerate(outputs)).backward()
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
        for mine, theirs in zip(inputs[0], inputs[1], strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-11, atol=1e-13)
        for (name, p), q in zip(fast.named_parameters(), slow.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-11, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")
        for optimizer in optimizers:
            optimizer.step()


def test_scale_is_alpha_over_r():
    adapter = make()
    assert (adapter.gate_up_proj.scale, adapter.down_proj.scale) == (1.5, pytest.approx(5 / 3))


def test_experts_without_rows_and_calls_without_rows_get_zero_gradients():
    adapter = make()
    randomize(adapter)
    x, a = torch.randn(2, HIDDEN), torch.randn(2, INTERMEDIATE)
    one_expert = torch.tensor([0, 2, 0, 0, 0, 0])
    (adapter.gate_up_delta(x, one_expert).sum() + adapter.down_delta(a, one_expert).sum()).backward()
    for name, parameter in adapter.named_parameters():
        assert parameter.grad[1].abs().min() > 0, name
        assert parameter.grad[[0, 2, 3, 4, 5]].eq(0).all(), name
    adapter.zero_grad()
    none = torch.zeros(EXPERTS, dtype=torch.int64)
    (adapter.gate_up_delta(x[:0], none).sum() + adapter.down_delta(a[:0], none).sum()).backward()
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.eq(0).all(), name


def test_never_keeps_a_dense_weight_for_backward():
    adapter = make()
    saved = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        adapter.gate_up_delta(torch.randn(6, HIDDEN), torch.ones(EXPERTS, dtype=torch.int64))
    stack = adapter.gate_up_proj
    assert sum(saved) == 6 * HIDDEN + stack.A.numel() + stack.B.numel() + 6 * 4


def test_untargeted_tensor_gets_a_zero_delta_of_the_right_shape():
    adapter = make(factors={"down_proj": (3, 5.0)})
    delta = adapter.gate_up_delta(torch.randn(5, HIDDEN), torch.tensor([5, 0, 0, 0, 0, 0]))
    assert delta.shape == (5, 2 * INTERMEDIATE)
    assert delta.eq(0).all()


@pytest.mark.parametrize("ep", [2, 3, 6])
def test_start_values_do_not_depend_on_the_expert_parallel_degree(ep):
    torch.manual_seed(5)
    whole = make()
    local = EXPERTS // ep
    for rank in range(ep):
        torch.manual_seed(rank)  # the global generator must not matter
        part = make(first=rank * local, local=local, ep=ep)
        for (name, p), q in zip(part.named_parameters(), whole.parameters(), strict=True):
            assert torch.equal(p, q[rank * local : (rank + 1) * local]), name
    assert whole.gate_up_proj.B.eq(0).all()
    a = whole.gate_up_proj.A
    assert a.abs().max() <= HIDDEN**-0.5
    assert all(not torch.equal(a[i], a[j]) for i in range(EXPERTS) for j in range(i))


def test_addresses_name_global_experts_and_only_expert_parallel_ones_are_tagged():
    part = make(first=4, local=2, ep=3)
    address = part.gate_up_proj.A.address
    assert address.param == "model.layers.3.mlp.experts.adapter.gate_up_proj.A"
    assert address.global_shape == (EXPERTS, 4, HIDDEN)
    assert [span.unit for span in address.units()] == [f"L03.E00{e}.adapter.gate_up_proj.A" for e in (4, 5)]
    assert all(p.allreduce is False and p.group_name == "ep_size_3" for p in part.parameters())
    assert not any(hasattr(p, "allreduce") or hasattr(p, "group_name") for p in make().parameters())


@pytest.mark.parametrize("ep", [2, 4])
def test_slices_of_one_adapter_add_up_to_the_whole_through_the_experts_seam(tiny_moe, ep):
    """Per-rank experts with slices of one adapter give the rows, and the gradients, of the whole."""
    from lora.attach import attach

    banks = {"e": BankConfig("expert-lora", r=4, alpha=8.0)}

    def built(layout: Layout, rank: int):
        model = tiny_moe(dtype=torch.float64)
        blocks = convert(model, layout, rank)
        attach(model, banks, blocks, layout_ep=layout.ep)
        return blocks[1].experts

    whole = built(Layout(), 0)
    randomize(whole.adapter)
    local = whole.num_experts // ep
    counts = torch.tensor([2, 0, 3, 1, 0, 0, 4, 1])
    x = torch.randn(int(counts.sum()), 32, dtype=torch.float64)
    x_whole = x.clone().requires_grad_()
    y_whole = whole.compute(x_whole, counts)
    y_whole.square().sum().backward()
    for rank in range(ep):
        part = built(Layout(ep, ep), rank)
        mine = slice(rank * local, (rank + 1) * local)
        with torch.no_grad():
            for p, q in zip(part.adapter.parameters(), whole.adapter.parameters(), strict=True):
                p.copy_(q[mine])
        rows = slice(int(counts[: mine.start].sum()), int(counts[: mine.stop].sum()))
        x_part = x[rows].clone().requires_grad_()
        y_part = part.compute(x_part, counts[mine])
        torch.testing.assert_close(y_part, y_whole[rows], rtol=1e-12, atol=0)
        y_part.square().sum().backward()
        torch.testing.assert_close(x_part.grad, x_whole.grad[rows], rtol=1e-10, atol=1e-14)
        for (name, p), q in zip(part.adapter.named_parameters(), whole.adapter.parameters(), strict=True):
            assert p.address.first_expert == mine.start
            torch.testing.assert_close(p.grad, q.grad[mine], rtol=1e-10, atol=1e-14, msg=name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("counts", [[40, 0, 130, 1, 0, 29], [0, 0, 0, 0, 0, 0]])
def test_grouped_products_on_cuda_equal_the_loop_and_leave_no_gradient_out(counts):
    part = ExpertSlice(0, EXPERTS, 0, EXPERTS)
    adapter = ExpertLoRA("x", part, 256, 128)
    adapter.add("gate_up_proj", bank_at(BankConfig("expert-lora"), 0, 1), device="cuda", dtype=torch.bfloat16)
    stack = adapter.gate_up_proj
    torch.manual_seed(0)
    with torch.no_grad():
        stack.B.normal_(0, 0.3)
    a, b = (p.detach().double().cpu().requires_grad_() for p in (stack.A, stack.B))
    x = torch.randn(sum(counts), 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    x_exact = x.detach().double().cpu().requires_grad_()
    got = adapter.gate_up_delta(x, torch.tensor(counts, device="cuda"))
    want = FactoredDelta.apply(x_exact, a, b, counts, stack.scale)
    dy = torch.randn_like(want)
    got.backward(dy.to(got))
    want.backward(dy)
    for name, mine, exact in [
        ("y", got, want),
        ("x", x.grad, x_exact.grad),
        ("A", stack.A.grad, a.grad),
        ("B", stack.B.grad, b.grad),
    ]:
        error = (mine.double().cpu() - exact).norm()
        assert error <= 0.01 * exact.norm(), name
    for expert, count in enumerate(counts):
        if not count:
            assert stack.A.grad[expert].eq(0).all()
            assert stack.B.grad[expert].eq(0).all()
