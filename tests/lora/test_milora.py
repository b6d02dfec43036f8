"""MiLoRA: one choice for a prompt, among the modules of a layer, as its formula has it."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from lora.attach import attach
from lora.combinations import faults
from lora.config import BankConfig
from lora.errors import AdapterError
from lora.exactness import FORMS, obstacles, require
from lora.format import apply_adapter, collect_adapter, load_adapter, save_adapter
from lora.presets import expand, expansion
from lora.watch import AdapterWatch
from moe.context import BatchContext, batch_context
from tests.lora.reference_milora import balance_loss, gates, module

HIDDEN, INNER, ROWS, LENGTH = 6, 10, 2, 6
NAMES = ("up_proj", "mid_proj", "down_proj")
MADE = {"targets": NAMES, "r": 3, "alpha": 6.0, "top_k": 2, "router_aux_loss_coef": 0.7}
BANKS = {
    "milora": BankConfig("milora", **MADE),
    "not renormalised": BankConfig("milora", renormalise=False, **MADE),
    "one of three": BankConfig("milora", renormalise=False, **MADE | {"top_k": 1}),
    "all, weighted": BankConfig("milora", NAMES, r=3, combine="soft", balance="none"),
}
TOKENS = torch.arange(24).view(2, 12)
TINY = ("q_proj", "k_proj", "v_proj", "o_proj")


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(HIDDEN, INNER, bias=False)
        self.mid_proj = nn.Linear(INNER, INNER, bias=False)
        self.down_proj = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(self.mid_proj(self.up_proj(x).sin()).sin())


class Model(nn.Module):
    """Two decoder layers, whose modules a prompt chooses among."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.config = type("Config", (), {"hidden_size": HIDDEN})()

    def forward(self, x: Tensor, recompute: bool = False) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        return x


def made(bank: BankConfig) -> Model:
    torch.manual_seed(0)
    model = Model().double()
    attach(model, {"one": bank}, [])
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.4, generator=generator)
    return model


def batch(kind: str) -> tuple[BatchContext, list[list[int]], list[int]]:
    """The context; of each sample that has a prompt its tokens, and the sample of each token (-1: padding)."""
    where = {"shape": (ROWS, LENGTH), "aux_scale": 0.5}
    if kind == "packed":
        segment_T = torch.tensor([0, 0, 0, 1, 1, 2, 0, 0, 1, 1, 1, 1])
        prompt_T = torch.tensor([1, 1, 0, 1, 0, 0, 1, 0, 1, 1, 1, 0]).bool()
        mask_T = torch.tensor([1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1]).bool()
        context = BatchContext(segment_T=segment_T, prompt_T=prompt_T, mask_T=mask_T, samples=3, **where)
        return context, [[0, 1], [3], [6], [8, 9, 10]], [0, 0, 0, 1, 1, -1, 2, 2, 3, 3, 3, 3]
    sample_T = [t // LENGTH for t in range(ROWS * LENGTH)]
    if kind == "nothing said":
        return BatchContext(**where), [list(range(LENGTH)), list(range(LENGTH, 2 * LENGTH))], sample_T
    prompt_T = torch.tensor([1, 1, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0]).bool()
    return BatchContext(prompt_T=prompt_T, **where), [[0, 1, 2], [6]], sample_T


def reference(model: Model, bank: BankConfig, x: Tensor, prompts, sample_T) -> tuple[Tensor, Tensor]:
    """Output of the two layers, and the losses with their coefficient."""
    full, loss, x_T = expand(bank), torch.zeros((), dtype=torch.float64), list(x.reshape(-1, HIDDEN))
    scale = full.alpha / full.r
    for layer in model.layers:
        p = dict(layer.named_parameters())
        rows = [p[f"{name}.adapter.router.weight"][0] for name in NAMES]
        top_k = len(NAMES) if full.combine == "soft" else full.top_k
        found = gates(rows, x_T, prompts, top_k, full.renormalise)
        loss = loss + (full.router_aux_loss_coef * balance_loss(found, top_k) if full.balance == "switch" else 0)

        def run(name, token, sample, p=p, found=found):
            gate = found[sample][0][NAMES.index(name)] if sample >= 0 else 0.0
            a, b = p[f"{name}.adapter.A"][0], p[f"{name}.adapter.B"][0]
            return module(p[f"{name}.weight"], a, b, scale, gate, token)

        x_T = [
            token + run("down_proj", run("mid_proj", run("up_proj", token, s).sin(), s).sin(), s)
            for token, s in zip(x_T, sample_T, strict=True)
        ]
    return torch.stack(x_T), loss


@pytest.mark.parametrize("kind", ["prompted", "packed", "nothing said", "recomputed"])
@pytest.mark.parametrize("name", BANKS)
def test_outputs_losses_and_all_gradients_over_three_steps(name, kind):
    bank = BANKS[name]
    fast, slow = made(bank), made(bank)
    context, prompts, sample_T = batch(kind)
    real = [t for t, sample in enumerate(sample_T) if sample >= 0]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (fast, slow)]
    for step in range(3):
        x = torch.randn(ROWS, LENGTH, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        x_fast, x_slow = x.clone().requires_grad_(), x.clone().requires_grad_()
        for optimizer in optimizers:
            optimizer.zero_grad()
        with batch_context(context):
            y = fast(x_fast, recompute=kind == "recomputed").view(-1, HIDDEN)
            y[real].sin().sum().backward()
        want, loss = reference(slow, bank, x_slow, prompts, sample_T)
        torch.testing.assert_close(y[real], want[real], rtol=1e-11, atol=1e-12)
        (want[real].sin().sum() + 0.5 * loss).backward()
        torch.testing.assert_close(x_fast.grad, x_slow.grad, rtol=1e-9, atol=1e-11)
        for (path, p), q in zip(fast.named_parameters(), slow.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-11, msg=lambda m, n=path: f"{n}: {m}")
        for optimizer in optimizers:
            optimizer.step()


def test_answers_do_not_change_what_their_prompt_chose():
    """A token's output depends on its prompt and on itself; the tokens to be predicted are not looked at."""
    model, (context, _, _) = made(BANKS["all, weighted"]), batch("prompted")
    x = torch.randn(ROWS, LENGTH, HIDDEN, dtype=torch.float64)
    other = x.clone()
    other[:, 4:] = 9.0
    with batch_context(context):
        assert torch.equal(model(x)[:, :4], model(other)[:, :4])


def test_a_sample_without_a_prompt_is_weighed_evenly_and_padding_that_is_no_number_counts_nowhere():
    model, (context, _, _) = made(BANKS["all, weighted"]), batch("packed")
    x = torch.randn(ROWS, LENGTH, HIDDEN, dtype=torch.float64)
    seen = []
    model.layers[0].up_proj.adapter.observe = seen.append
    with batch_context(context):
        model(x)
    assert torch.allclose(seen[0][5], torch.tensor([1 / 3], dtype=torch.float64))


# -- generation --------------------------------------------------------------------------------------------------------


def tiny(tiny_dense, adapted, **more):
    return adapted(tiny_dense(), {"one": BankConfig("milora", TINY, r=2, top_k=2, **more)}, std=0.6)


def test_generated_tokens_are_weighed_as_their_prompt_was(tiny_dense, adapted):
    model, prompt = tiny(tiny_dense, adapted), 7
    told = torch.zeros(TOKENS.shape, dtype=torch.bool)
    told[:, :prompt] = True
    with torch.no_grad(), batch_context(BatchContext(balance=False, prompt_T=told.flatten(), shape=(2, 12))):
        want = model(TOKENS, use_cache=False).logits
    cache, got = DynamicCache(config=model.config), []
    with torch.no_grad():
        for piece in (TOKENS[:, :prompt], *TOKENS[:, prompt:].split(1, 1)):
            got.append(model(piece, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # where all of it is the prompt, its last tokens weigh too
        assert (model(TOKENS, use_cache=False).logits[:, -1] - want[:, -1]).abs().max() > 1e-3


def test_a_cache_that_another_model_filled_is_refused(tiny_dense, adapted):
    model, cache = tiny(tiny_dense, adapted), DynamicCache(config=tiny_dense().config)
    with torch.no_grad():
        tiny_dense()(TOKENS, past_key_values=cache)
        with pytest.raises(AdapterError, match=r"layers\.0: the prompt's weights are not known for this cache"):
            model(TOKENS[:, :1], past_key_values=cache)


def test_layers_that_are_run_in_parts_are_refused(tiny_dense, adapted):
    model = tiny(tiny_dense, adapted)
    with pytest.raises(AdapterError, match=r"q_proj\.adapter\.router: nobody chose for this prompt"):
        model.model.layers[0].self_attn.q_proj(torch.zeros(1, 3, 32))
    model(TOKENS)
    with pytest.raises(AdapterError, match="nobody chose"):  # nor is an earlier choice taken
        model.model.layers[0].self_attn.q_proj(torch.zeros(2, 12, 32))


# -- what is around it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True])
def test_the_watch_expects_a_gradient_of_modules_that_were_chosen_alone(tiny_dense, recompute):
    model = tiny_dense()
    attach(model, {"one": BankConfig("milora", TINY, r=2, top_k=1, renormalise=False)}, [])
    with torch.no_grad():  # so that the first module is never chosen
        for layer in model.model.layers:
            for i, name in enumerate(TINY):
                getattr(layer.self_attn, name).adapter.router.weight.fill_(0.1 * i)
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    watch = AdapterWatch(model)
    model.train()
    with batch_context(BatchContext()):
        model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    pending = watch.check()
    chosen = {name for name, p in model.named_parameters() if name.endswith(".B") and p.grad.abs().sum() > 0}
    every = {f"model.layers.{i}.self_attn.{name}.adapter.B" for i in range(2) for name in TINY}
    assert set(pending) == every - chosen
    assert 2 <= len(chosen) < len(every)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_its_folder_comes_back_and_nothing_else_is_exact(tiny_dense, adapted, tmp_path):
    model = tiny(tiny_dense, adapted)
    banks = {"one": BankConfig("milora", TINY, r=2, top_k=2)}
    save_adapter(tmp_path / "a", collect_adapter(model), banks, "base")
    again = tiny_dense()
    apply_adapter(again, load_adapter(tmp_path / "a"), base_fingerprint="base")
    with torch.no_grad():
        assert torch.equal(again.eval()(TOKENS).logits, model(TOKENS).logits)
    assert '"MOE_BANK"' in (tmp_path / "a" / "adapter_config.json").read_text()
    assert all(obstacles(banks)[form] for form in FORMS)
    with pytest.raises(AdapterError, match=r"adapter\.one \(milora\) weighs its experts by a router for each prompt"):
        require("peft", banks)


def test_its_expansion_is_printed():
    assert expansion(BankConfig("milora", r=4)) == (
        "milora: targets [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj], site linear, r 4, rank_rule "
        "fixed, alpha 16.0, scaling r, share none, kind lowrank, mixer false, dropout 0.0, a_init kaiming, router_init "
        "0.02, router prompt, combine top_k, top_k 3, renormalise true, balance switch, router_aux_loss_coef 0.01, "
        "balance_pooled false"
    )


@pytest.mark.parametrize(
    ("bank", "part"),
    [
        (BankConfig("milora", num_experts=4), None),
        (BankConfig("milora", combine="switch"), "combine=switch with router: prompt"),
        (BankConfig("milora", share="A"), "share=A, and with router: prompt each module is one expert"),
        (BankConfig("milora", mixer=True), "mixer=true, and with router: prompt"),
        (BankConfig("milora", balance="product", combine="soft"), "balance=product is for weights of tokens"),
        (BankConfig("milora", balance_pooled=True), "balance_pooled=true, and router: prompt"),
        (BankConfig("milora", top_k=1), "renormalise=true makes the only weight of top_k=1"),
        (BankConfig("milora", adapters=("a", "b")), "router=prompt weighs no adapters"),
        (BankConfig("perft-s", router="prompt"), "router=prompt with site: parallel"),
        (BankConfig("mixlora", router="prompt"), "router=prompt with site: ffn"),
    ],
)
def test_what_it_cannot_be_combined_with_is_named(bank, part):
    found = [sentence for _, sentence in faults(expand(bank))]
    assert (not found) if part is None else any(part in sentence for sentence in found), found


def test_a_layer_has_to_have_as_many_modules_as_are_chosen(tiny_dense):
    for targets, top_k, part in (
        (("q_proj", "v_proj"), 3, "among 3 or more modules of a layer, and its targets name 2 in layer 0; add targets"),
        (("layers.0.*.q_proj", "layers.*.v_proj"), 2, "name 1 in layer 1"),
        (("q_proj",), 1, "among 2 or more modules"),
    ):
        bank = BankConfig("milora", targets, r=2, top_k=top_k, renormalise=top_k > 1)
        with pytest.raises(AdapterError, match=re.escape(part)):
            attach(tiny_dense(), {"one": bank}, [])
