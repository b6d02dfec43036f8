"""Every preset of linear layers, as it stands, from attaching through training to a saved and loaded adapter.

But for those of trained adapters, which need some: test_trained.py has them.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lora.attach import attach
from lora.config import BankConfig
from lora.format import apply_adapter, collect_adapter, load_adapter, save_adapter
from lora.presets import PRESETS, expand
from lora.watch import AdapterWatch
from moe.context import BatchContext, batch_context
from moe.convert import convert

BANKS = {preset: expand(BankConfig(preset)) for preset in PRESETS}
LINEAR = [preset for preset, bank in BANKS.items() if bank.site == "linear" and bank.score == "linear"]
TOKENS = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))


def context(balance: bool) -> BatchContext:
    return BatchContext(balance=balance, shape=(2, 12), task_T=torch.arange(2).repeat_interleave(12))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad(), batch_context(context(balance=False)):
        return model.eval()(TOKENS).logits


def test_there_are_presets_of_linear_layers():
    assert {"lora", "rslora", "molora", "mov", "loramoe", "mola", "moelora", "moelora-task"} < set(LINEAR)
    assert {"hydralora", "adamole", "moslora"} < set(LINEAR)


@pytest.mark.parametrize("preset", LINEAR)
def test_a_preset_trains_every_parameter_and_comes_back_from_its_folder(tiny_moe, tmp_path, preset):
    tasks = {"num_tasks": 2} if preset == "moelora-task" else {}
    tasks |= {"top_k": 2} if preset == "milora" else {}  # of the two modules of a layer
    banks = {"a": BankConfig(preset, targets=("q_proj", "v_proj"), **tasks)}
    model = tiny_moe()
    before = logits(model)
    attach(model.train(), banks, convert(model))
    torch.testing.assert_close(logits(model), before)
    trained = {path: p for path, p in model.named_parameters() if p.requires_grad}
    start = {path: p.detach().clone() for path, p in trained.items()}
    optimizer, watch = torch.optim.AdamW(trained.values(), lr=1e-2), AdapterWatch(model.train())
    for _ in range(3):
        optimizer.zero_grad()
        with batch_context(context(balance=True)):
            model(TOKENS, labels=TOKENS).loss.backward()
        watch.check()  # raises for what saw tokens and did not move
        optimizer.step()
    assert not [path for path, p in trained.items() if torch.equal(p, start[path])]
    save_adapter(tmp_path / "adapter", collect_adapter(model), banks, "")
    twin = tiny_moe()
    convert(twin)
    apply_adapter(twin, load_adapter(tmp_path / "adapter"))
    assert torch.equal(logits(twin), logits(model))
