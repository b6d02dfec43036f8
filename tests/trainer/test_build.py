"""Building a model: what is taken for granted about its batches, and how its experts run."""

from __future__ import annotations

import pytest
import torch
from transformers import masking_utils

from moe.build import new_model
from moe.convert import convert
from moe.kernels.backend import BackendError
from trainer.build import _settle_backends
from trainer.sample_borders import respect_borders

FIELDS = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


def test_a_forward_pass_does_not_look_for_packed_sequences_and_computes_the_same(monkeypatch):
    looked = []
    packed = masking_utils.find_packed_sequence_indices

    def look(position_ids):
        looked.append(position_ids)
        return packed(position_ids)

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", look)
    model = new_model("qwen3_moe", FIELDS, vocab_size=64, seed=1, dtype=torch.float32)
    ids_BS = torch.arange(24).reshape(2, 12)
    expected = model(input_ids=ids_BS, use_cache=False).logits
    assert looked, "transformers looks for them elsewhere now: see trainer.sample_borders"
    looked.clear()
    respect_borders()
    assert torch.equal(model(input_ids=ids_BS, use_cache=False).logits, expected)
    assert not looked


def test_each_way_in_which_experts_run_is_told_once_and_with_its_layers():
    fields = {**FIELDS, "num_hidden_layers": 3}
    blocks = convert(new_model("qwen3_moe", fields, vocab_size=64, seed=1, dtype=torch.float32))
    (line,) = _settle_backends(blocks, "auto")
    assert line.startswith("experts run as minimal: ")
    blocks[1].experts.adapter = torch.nn.Identity()
    first, second = _settle_backends(blocks, "auto")
    assert first.startswith("experts of layers 0, 2 run as minimal: ")
    assert second.startswith("experts of layers 1 run as grouped_mm: its adapter needs")
    with pytest.raises(BackendError, match="'minimal' cannot run here: its adapter"):
        _settle_backends(blocks, "minimal")
