"""The executor over the slot kernels; run by test_slot_kernels.py, interpreted where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from inference.cache import ExpertCache
from inference.expert_block import ExpertShape
from inference.experts import OffloadedExperts
from inference.predictors import SameAsLast
from inference.slot_calls import SlotCalls
from inference.store import ExpertStore, TensorFiles
from tests.inference.linked import Linked

LAYERS, EXPERTS, TOP_K, HIDDEN, INNER = 2, 8, 2, 16, 24


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder, generator, tensors = tmp_path_factory.mktemp("experts"), torch.Generator().manual_seed(0), {}
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            path = f"model.layers.{layer}.mlp.experts.{expert}"
            for name, shape in (("gate", (INNER, HIDDEN)), ("up", (INNER, HIDDEN)), ("down", (HIDDEN, INNER))):
                tensors[f"{path}.{name}_proj.weight"] = torch.randn(shape, generator=generator)
    save_file(tensors, folder / "model.safetensors")
    paths = {layer: f"model.layers.{layer}.mlp.experts" for layer in range(LAYERS)}
    return ExpertStore(TensorFiles(folder), paths, ExpertShape(EXPERTS, HIDDEN, INNER))


def batch(tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(tokens, EXPERTS, generator=generator).argsort(dim=1)[:, :TOP_K]
    return torch.randn(tokens, HIDDEN, generator=generator), index, torch.rand(tokens, TOP_K, generator=generator)


def linked(store, slots, **options):
    made = Linked(store, slots, **options)
    made.executor.slot_calls = SlotCalls(made.cache)
    return made


@pytest.mark.parametrize("slots", [0, 1, 5])
def test_bits_do_not_depend_on_what_is_resident(store, slots):
    resident = linked(store, store.total)
    some = linked(store, slots, predictor=lambda layers, experts, _: SameAsLast(layers, experts, TOP_K, lead=1))
    plain = ExpertCache(store, store.total)
    for number in range(5):
        for layer in range(LAYERS):
            call = batch((1, 3)[number % 2], 10 * number + layer)
            expected = resident(layer, *call)
            assert torch.equal(some(layer, *call), expected), (number, layer)
            reference = OffloadedExperts(plain, layer, torch.nn.functional.silu)(*call)
            torch.testing.assert_close(expected, reference, rtol=1e-4, atol=1e-4)
            some.link.advance(1e-5)


class Lane:
    def __init__(self, store):
        self.store, self.computed = store, 0

    def submit(self, layer, work, x_NH):
        out, start = torch.zeros(x_NH.shape), 0
        for expert, rows in work:
            gate, up, down = self.store.views(layer, expert)
            x = x_NH[start : start + rows]
            out[start : start + rows] = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
            start += rows
            self.computed += 1

        class Done:
            def result(self):
                return out

        return Done()


def test_what_the_cpu_computes_joins_in(store):
    lane = Lane(store)

    def plan(missing, resident_rows, worth):
        return [e for e, _ in missing[1:]], [e for e, _ in missing[:1]]

    resident, some = linked(store, store.total), linked(store, 3, cpu=lane, plan=plan)
    for number in range(4):
        for layer in range(LAYERS):
            call = batch(3, 10 * number + layer)
            torch.testing.assert_close(some(layer, *call), resident(layer, *call), rtol=1e-4, atol=1e-4)
    assert lane.computed == some.cache.counts.computed > 4
