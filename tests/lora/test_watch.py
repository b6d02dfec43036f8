"""The watch must catch every way an adapter can silently stay untrained, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from lora.attach import attach
from lora.config import BankConfig
from lora.errors import AdapterError
from lora.experts import ExpertLoRA
from lora.watch import AdapterWatch
from moe.convert import convert
from moe.layout import Layout
from moe.refs import TensorAddress

BANKS = {
    "e": BankConfig("expert-lora", r=4, alpha=8.0),
    "a": BankConfig("mola", r=2, alpha=4.0, num_experts=4, top_k=2),
}
TOKENS = torch.arange(64).view(2, 32)


def built(tiny_moe, banks=BANKS):
    model = tiny_moe()
    blocks = convert(model)
    attach(model, banks, blocks)
    in_pieces(blocks)
    return model, blocks


def in_pieces(blocks):
    """So that the tests may cut off a single piece."""
    for block in blocks:
        block.experts.wanted_backend = "grouped_mm"


def step(model, tokens: Tensor = TOKENS, labels: Tensor | None = None) -> None:
    model(tokens, labels=tokens if labels is None else labels).loss.backward()


def number_of_hooks(model) -> int:
    return sum(len(m._forward_hooks) for m in model.modules()) + sum(
        len(p._backward_hooks or {}) for p in model.parameters()
    )


def test_passes_at_the_first_step_then_costs_nothing(tiny_moe):
    model, _ = built(tiny_moe)
    hooks = number_of_hooks(model)
    watch = AdapterWatch(model)
    assert number_of_hooks(model) > hooks
    step(model)
    pending = watch.check()
    while pending:
        step(model, torch.randint(64, (2, 32)))
        pending = watch.check()
    assert watch.done
    assert number_of_hooks(model) == hooks
    model.zero_grad()
    assert watch.check(reduce=lambda _: pytest.fail("a watch that is done must not communicate")) == []


def test_hooks_suffice_when_gradients_are_taken_away_during_backward(tiny_moe):
    model, _ = built(tiny_moe)
    watch = AdapterWatch(model)
    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))  # as ZeRO-1/2 do
    step(model)
    assert all(p.grad is None for p in model.parameters())
    watch.check()


def _detached(tensor: str):
    original = getattr(ExpertLoRA, f"{tensor}_delta")
    return lambda self, x, counts: original(self, x, counts).detach()


@pytest.mark.parametrize(("method", "name"), [("down", "down_proj"), ("gate_up", "gate_up_proj")])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_detached_expert_adapter_is_named(tiny_moe, monkeypatch, layer, method, name):
    model, blocks = built(tiny_moe)
    adapter = blocks[layer].experts.adapter
    monkeypatch.setattr(adapter, f"{method}_delta", partial(_detached(method), adapter))
    watch = AdapterWatch(model)
    step(model)
    with pytest.raises(AdapterError) as caught:
        watch.check()
    other = {"down_proj": "gate_up_proj", "gate_up_proj": "down_proj"}[name]
    assert f"L0{layer}.E00" in str(caught.value)
    assert f".adapter.{name}.B" in str(caught.value)
    assert f"adapter.{other}" not in str(caught.value)
    assert f"L0{1 - layer}.E" not in str(caught.value)


def test_one_expert_out_of_many_is_named(tiny_moe, monkeypatch):
    model, blocks = built(tiny_moe)
    adapter = blocks[1].experts.adapter
    original = adapter.down_delta

    def loses_expert_5(a, counts):
        keep = torch.arange(8).repeat_interleave(counts) != 5
        return original(a, counts) * keep.unsqueeze(-1)

    monkeypatch.setattr(adapter, "down_delta", loses_expert_5)
    watch = AdapterWatch(model)
    step(model)
    with pytest.raises(AdapterError, match=r"^no gradient reached L01\.E005\.adapter\.down_proj\.B, although"):
        watch.check()


def test_an_adapter_that_is_never_called_is_named(tiny_moe, monkeypatch):
    model, blocks = built(tiny_moe)
    experts = blocks[0].experts
    watch = AdapterWatch(model)

    def without_adapter(x, counts, compute=experts.compute):
        adapter, experts.adapter = experts.adapter, None
        try:
            return compute(x, counts)
        finally:
            experts.adapter = adapter

    monkeypatch.setattr(experts, "compute", without_adapter)
    step(model)
    with pytest.raises(AdapterError, match=r"L00\.E00\d\.adapter\.gate_up_proj\.B"):
        watch.check()


def test_output_with_no_graph_at_all_is_named(tiny_moe, monkeypatch):
    """Layer 0 fully cut off: nothing below requires a gradient any more, so autograd never gets there."""
    model = tiny_moe()
    blocks = convert(model)
    attach(model, {"e": BANKS["e"]}, blocks)
    in_pieces(blocks)
    for method in ("gate_up", "down"):
        adapter = blocks[0].experts.adapter
        monkeypatch.setattr(adapter, f"{method}_delta", partial(_detached(method), adapter))
    watch = AdapterWatch(model)
    step(model)
    with pytest.raises(AdapterError, match=r"L00\.E00\d\.adapter\.gate_up_proj\.B.*L00"):
        watch.check()


def test_frozen_adapter_and_detached_linear_bank_are_named(tiny_moe, monkeypatch):
    model, blocks = built(tiny_moe)
    blocks[1].experts.adapter.down_proj.B.requires_grad_(False)
    watch = AdapterWatch(model)
    step(model)
    with pytest.raises(AdapterError, match=r"L01\.E00\d\.adapter\.down_proj\.B"):
        watch.check()

    model, blocks = built(tiny_moe)
    bank = model.model.layers[1].self_attn.v_proj.adapter
    monkeypatch.setattr(bank, "forward", lambda x, y, f=bank.forward: f(x, y).detach())
    watch = AdapterWatch(model)
    step(model)
    with pytest.raises(AdapterError, match=r"reached model\.layers\.1\.self_attn\.v_proj\.adapter\.B\[0\], "):
        watch.check()


def test_tokens_without_loss_evaluation_and_unrouted_experts_raise_no_alarm(tiny_moe):
    model, _ = built(tiny_moe)
    watch = AdapterWatch(model)
    with torch.no_grad():
        model(TOKENS)
    labels = torch.full((1, 6), -100)
    labels[0, 1] = 3  # only position 0 carries loss: in the last layer the other tokens get no gradient
    step(model, TOKENS[:1, :6], labels)
    pending = watch.check()
    last_layer = [name for name in pending if name.startswith("L01") and "down_proj" in name]
    assert len(last_layer) == 8 - 2
    assert not watch.done


def test_an_expert_whose_weight_is_zero_raises_no_alarm(tiny_moe):
    model, blocks = built(tiny_moe)

    def drop_expert_5(_gate, _args, output):
        logits_TE, scores_TK, index_TK = output
        return logits_TE, scores_TK * (index_TK != 5), index_TK

    blocks[1].gate.register_forward_hook(drop_expert_5)
    watch = AdapterWatch(model)
    step(model)
    assert {"L01.E005.adapter.gate_up_proj.B", "L01.E005.adapter.down_proj.B"} <= set(watch.check())


def test_an_expert_first_routed_later_is_checked_then(tiny_moe, monkeypatch):
    model, blocks = built(tiny_moe)
    watch = AdapterWatch(model)
    step(model, TOKENS[:1, :2])
    pending = watch.check()
    late = next(name for name in pending if name.startswith("L01") and "down_proj" in name)
    adapter = blocks[1].experts.adapter
    monkeypatch.setattr(adapter, "down_delta", partial(_detached("down"), adapter))
    step(model)
    with pytest.raises(AdapterError) as caught:
        watch.check()
    assert late in str(caught.value)


def test_ranks_are_judged_together(tiny_moe):
    """Rank 1 holds experts that only rank 0's tokens chose: the sum over ranks tells, on both ranks."""
    banks = {"e": BANKS["e"]}
    model, _ = built(tiny_moe, banks)
    whole = AdapterWatch(model)
    step(model)
    gathered = []
    whole.check(reduce=lambda flags: gathered.append(flags.clone()) or flags)
    elsewhere = gathered[0]

    part = tiny_moe()
    attach(part, banks, convert(part, Layout(2, 2), 1), layout_ep=2)
    watch = AdapterWatch(part)
    pending = watch.check(reduce=lambda flags: flags)
    assert len(pending) == elsewhere.shape[1]  # every rank reports all global experts
    seen_there = elsewhere * torch.tensor([[1.0], [0.0]])
    with pytest.raises(AdapterError, match=r"L00\.E00\d\.adapter\.gate_up_proj\.B"):
        watch.check(reduce=lambda flags: flags + seen_there)
    assert len(watch.check(reduce=lambda flags: flags + elsewhere)) == int((elsewhere[0] == 0).sum())


def test_an_expert_of_a_routed_bank_that_no_token_chose_raises_no_alarm_and_one_that_lost_its_gradient_does(
    tiny_moe, monkeypatch
):
    model, _ = built(tiny_moe, {"a": BANKS["a"]})
    path = "model.layers.1.self_attn.v_proj"
    bank = model.get_submodule(path).adapter
    decide = bank.router.forward

    def never_3(x):
        decision = decide(x)
        return replace(decision, gate_TE=decision.gate_TE * torch.tensor([1.0, 1, 1, 0]))

    monkeypatch.setattr(bank.router, "forward", never_3)
    watch = AdapterWatch(model)
    step(model)
    assert f"{path}.adapter.B[3]" in watch.check()

    model, _ = built(tiny_moe, {"a": BANKS["a"]})
    bank = model.get_submodule(path).adapter
    bank.B.register_hook(lambda grad: grad * torch.tensor([1.0, 0, 1, 1]).view(4, 1, 1))
    watch = AdapterWatch(model)
    step(model)
    with pytest.raises(AdapterError, match=r"^no gradient reached \S+layers\.1\.self_attn\.v_proj\.adapter\.B\[1\], "):
        watch.check()


class _Beside(torch.nn.Module):
    """A block with a bank of our own making: three experts, of which token t uses number t mod 2."""

    def __init__(self, connected: bool = True) -> None:
        super().__init__()
        self.adapter = torch.nn.Module()
        self.adapter.B = torch.nn.Parameter(torch.zeros(3, 4, 4))
        self.adapter.B.address = TensorAddress("block.adapter.B", (3, 4, 4))
        self.adapter.observe, self.connected = None, connected
        self.adapter.probes = lambda: [("B", self.adapter.B)]

    def forward(self, x_TH: Tensor) -> tuple[Tensor, str]:
        gate_TE = torch.nn.functional.one_hot(torch.arange(len(x_TH)) % 2, 3).float()
        if self.adapter.observe is not None:
            self.adapter.observe(gate_TE)
        delta = torch.einsum("te,eoh,th->to", gate_TE, self.adapter.B, x_TH)
        return x_TH + (delta if self.connected else delta.detach()), "something else"


def test_any_module_with_probes_is_watched_whatever_its_class():
    model = torch.nn.Sequential(_Beside())
    watch = AdapterWatch(model)
    y_TH, other = model(torch.randn(1, 4))
    assert other == "something else"
    y_TH.sum().backward()
    assert watch.check() == ["0.adapter.B[1]", "0.adapter.B[2]"]
    model(torch.randn(6, 4))[0].sum().backward()
    assert watch.check() == ["0.adapter.B[2]"]
    watch.close()
    assert model[0].adapter.observe is None
    assert number_of_hooks(model) == 0

    model = torch.nn.Sequential(_Beside(connected=False))
    watch = AdapterWatch(model)
    model(torch.randn(1, 4, requires_grad=True))[0].sum().backward()
    with pytest.raises(AdapterError, match=r"^no gradient reached 0\.adapter\.B\[0\], although"):
        watch.check()


@pytest.mark.parametrize(("steps", "checks"), [(1500, [2**n for n in range(11)]), (6, [1, 2, 4, 6])])
def test_what_is_never_routed_is_asked_for_ever_more_rarely_and_then_left(steps, checks):
    model, found, lines = torch.nn.Sequential(_Beside()), [], {}
    watch = AdapterWatch(model)
    for number in range(1, steps + 1):
        model(torch.randn(2, 4))[0].sum().backward()
        line = watch.after_step(lambda flags, n=number: found.append(n) or flags, last=number == steps)
        lines |= {number: line} if line else {}
    assert found == checks
    assert lines == {
        1: "not yet routed, checked when they are: 0.adapter.B[2]",
        checks[-1]: f"never routed in {checks[-1]} steps, so not known to train: 0.adapter.B[2]",
    }
    assert watch.done
    assert number_of_hooks(model) == 0


def test_what_is_cut_off_between_two_checks_is_named_at_the_next():
    model = torch.nn.Sequential(_Beside())
    watch = AdapterWatch(model)
    for tokens in (1, 1, 2):
        model[0].connected = tokens == 1
        model(torch.randn(tokens, 4, requires_grad=True))[0].sum().backward()
        watch.after_step()
    model[0].connected = True
    model(torch.randn(1, 4))[0].sum().backward()
    with pytest.raises(AdapterError, match=r"^no gradient reached 0\.adapter\.B\[1\], although"):
        watch.after_step()


def test_an_adapter_without_probes_cannot_be_watched():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model[0].adapter = torch.nn.Linear(2, 2)
    with pytest.raises(AdapterError, match=r"0\.adapter .Linear. has no probes"):
        AdapterWatch(model)
