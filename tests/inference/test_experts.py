from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import silu

from inference.cache import ExpertCache
from inference.errors import InferenceError
from inference.expert_block import ExpertShape
from inference.experts import Call, OffloadedExperts
from inference.store import ExpertStore, TensorFiles
from moe.form import ExpertForm

LAYER = 2


@pytest.fixture(scope="module")
def store(model_folder):
    paths = {layer: f"model.layers.{layer}.mlp.experts" for layer in range(4)}
    return ExpertStore(TensorFiles(model_folder), paths, ExpertShape(16, 64, 32))


@pytest.fixture(scope="module")
def weights(model_folder):
    tensors = load_file(model_folder / "model.safetensors")
    prefix = f"model.layers.{LAYER}.mlp.experts"
    return [
        [tensors[f"{prefix}.{e}.{name}.weight"] for name in ("gate_proj", "up_proj", "down_proj")] for e in range(16)
    ]


def batch(tokens, seed=0, experts=16, top_k=4):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 64, generator=generator)
    index = torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :top_k]
    return x, index, torch.rand(tokens, top_k, generator=generator)


def naive(weights, x, index, scores, delta=None):
    """One token and one expert at a time in fp64; ``delta[e]`` is (gate_up [2I,H], down [H,I]), dense."""
    out = torch.zeros_like(x, dtype=torch.float64)
    for t in range(x.shape[0]):
        for e, score in zip(index[t].tolist(), scores[t], strict=True):
            gate, up, down = (w.double() for w in weights[e])
            if delta is not None:
                gate, up, down = gate + delta[e][0][:32], up + delta[e][0][32:], down + delta[e][1]
            v = x[t].double()
            out[t] += score.double() * (down @ (silu(gate @ v) * (up @ v)))
    return out


def offloaded(store, slots):
    return OffloadedExperts(ExpertCache(store, slots, poison=True), LAYER, silu)


@pytest.mark.parametrize("tokens", [0, 1, 33])
@pytest.mark.parametrize("slots", [0, 1, 5, 64])
def test_equals_a_naive_reference(store, weights, tokens, slots):
    x, index, scores = batch(tokens)
    got = offloaded(store, slots)(x, index, scores)
    torch.testing.assert_close(got.double(), naive(weights, x, index, scores), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 33])
def test_bits_do_not_depend_on_residency(store, tokens):
    calls = [batch(tokens, seed) for seed in range(4)]
    runs = []
    for slots in (0, 1, 6, 64):
        experts = offloaded(store, slots)
        runs.append([experts(*call) for call in calls])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("tokens", [1, 33])
def test_bits_equal_the_eager_loop_of_transformers(store, model_folder, tokens):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder, experts_implementation="eager")
    x, index, scores = batch(tokens)
    with torch.no_grad():
        theirs = model.model.layers[LAYER].mlp.experts(x, index, scores)
    assert torch.equal(offloaded(store, 6)(x, index, scores), theirs)


FORMS = {
    "silu": (ExpertForm(), silu),
    "gelu": (ExpertForm(act="gelu"), torch.nn.functional.gelu),
    "gpt_oss": (ExpertForm(transposed=True, interleaved=True, limit=7.0), silu),
}


@pytest.mark.parametrize("tokens", [1, 3, 70])
@pytest.mark.parametrize("name", FORMS)
def test_bits_do_not_depend_on_residency_for_any_activation(tmp_path, name, tokens):
    """Of some activations torch rounds an element by where it stands in a tensor."""
    form, act = FORMS[name]
    generator, shape = torch.Generator().manual_seed(1), ExpertShape(8, 24, 12, form, biased=form.transposed)
    stacks = {
        f"model.layers.0.mlp.experts.{part.name}": torch.randn(8, *part.shape, generator=generator) / 3
        for part in shape.unplaced
    }
    save_file(stacks, tmp_path / "model.safetensors")
    store = ExpertStore(TensorFiles(tmp_path), {0: "model.layers.0.mlp.experts"}, shape)
    index = torch.rand(tokens, 8, generator=generator).argsort(dim=1)[:, :4]
    call = torch.randn(tokens, 24, generator=generator), index, torch.rand(tokens, 4, generator=generator)
    runs = []
    for slots in (8, 0, 1, 3):
        experts = OffloadedExperts(ExpertCache(store, slots, poison=True), 0, act)
        runs += [experts(*call), experts(*call)]
    assert all(torch.equal(run, runs[0]) for run in runs)


class DenseDelta(torch.nn.Module):
    """An adapter as the seam defines it, from dense per-expert deltas."""

    def __init__(self, generator):
        super().__init__()
        self.gate_up = torch.randn(16, 64, 64, generator=generator) * 0.1
        self.down = torch.randn(16, 64, 32, generator=generator) * 0.1

    def _apply_rows(self, stack, x, counts):
        parts = [part @ stack[e].T for e, part in enumerate(x.split(counts.tolist()))]
        return torch.cat(parts)

    def gate_up_delta(self, x_NH, counts_L):
        return self._apply_rows(self.gate_up, x_NH, counts_L)

    def down_delta(self, a_NI, counts_L):
        return self._apply_rows(self.down, a_NI, counts_L)


@pytest.mark.parametrize("slots", [0, 5, 64])
def test_an_adapter_adds_its_deltas(store, weights, slots):
    experts = offloaded(store, slots)
    experts.adapter = DenseDelta(torch.Generator().manual_seed(3))
    x, index, scores = batch(21)
    delta = list(zip(experts.adapter.gate_up.double(), experts.adapter.down.double(), strict=True))
    expected = naive(weights, x, index, scores, delta)
    torch.testing.assert_close(experts(x, index, scores).double(), expected, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(naive(weights, x, index, scores), expected, atol=1e-1)


def test_holds_no_parameters(store):
    assert list(offloaded(store, 6).parameters()) == []


@pytest.mark.parametrize("slots", [0, 2, 64])
@pytest.mark.parametrize("seed", range(4))
def test_one_token_has_the_bits_of_the_general_way(store, slots, seed):
    x, index, scores = batch(1, seed)
    experts = offloaded(store, slots)
    call = Call.of(index.numpy(), 16)
    want = experts.compute(call, x, scores, experts.cache.lend(LAYER, call.experts))
    assert torch.equal(offloaded(store, slots)(x, index, scores), want)


def test_an_expert_that_is_none_is_refused_for_one_token_too(store):
    x, index, scores = batch(1)
    index[0, 2] = 16
    with pytest.raises(InferenceError, match="a gate chose expert 16 of 16"):
        offloaded(store, 4)(x, index, scores)
