"""Merged experts against loops over sequences, in float64, with gradients; and what may be seen of the future."""

import pytest
import torch
from torch.nn import functional as F

from moe.convert import convert
from moe.merging import MergedExperts
from moe.soft import replace_blocks
from tests.moe.test_soft import same_with_gradients


def naive(block, x_BSH):
    step = block.segment or x_BSH.shape[1]
    out = []
    for x_SH in x_BSH:
        rows, previous = [], None
        for part in x_SH.split(step):
            routed_by = part if not block.segment else previous
            router_in = block.before if routed_by is None else routed_by.mean(0)
            p_E = (block.router @ router_in).softmax(0)
            gate_up = sum(p * w for p, w in zip(p_E, block.experts.gate_up_proj, strict=True))
            down = sum(p * w for p, w in zip(p_E, block.experts.down_proj, strict=True))
            for x_H in part:
                gate_I, up_I = (gate_up @ x_H).chunk(2)
                rows.append(down @ (F.silu(gate_I) * up_I))
            previous = part
        out.append(torch.stack(rows))
    return torch.stack(out)


def make(tiny_model, segment):
    block = MergedExperts(convert(tiny_model().double())[0], segment)
    generator = torch.Generator().manual_seed(2)
    for parameter in block.parameters():  # large enough for probabilities that differ
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
    return block, torch.randn(2, 7, 32, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("segment", [0, 1, 3, 7, 10])
def test_output_and_gradients_equal_the_loops(tiny_model, segment):
    block, x_BSH = make(tiny_model, segment)
    same_with_gradients(block, lambda x: naive(block, x), x_BSH, rtol=1e-5)  # the softmax is taken in fp32


@pytest.mark.parametrize("segment", [1, 3, 10])
def test_segments_see_nothing_of_later_tokens(tiny_model, segment):
    block, x_BSH = make(tiny_model, segment)
    for position in range(7):
        changed = x_BSH.clone()
        changed[:, position:] += 1
        assert torch.equal(block(changed)[:, :position], block(x_BSH)[:, :position])


def test_whole_sequences_do_see_later_tokens(tiny_model):
    block, x_BSH = make(tiny_model, 0)
    changed = x_BSH.clone()
    changed[:, -1] += 1
    assert not torch.allclose(block(changed)[:, 0], block(x_BSH)[:, 0])


def test_a_new_block_merges_its_first_segment_equally(tiny_model):
    block = MergedExperts(convert(tiny_model())[0], 4)
    x_BSH = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(3))
    gate_up, down = block.experts.gate_up_proj.mean(0), block.experts.down_proj.mean(0)
    gate, up = (x_BSH @ gate_up.T).chunk(2, -1)
    torch.testing.assert_close(block(x_BSH), (F.silu(gate) * up) @ down.T)


def test_the_whole_model_stays_causal_and_trains_every_parameter(tiny_model):
    model = tiny_model()
    replace_blocks(model, convert(model), lambda block: MergedExperts(block, 2))
    ids_BS = torch.arange(8)[None]
    logits = model(input_ids=ids_BS, use_cache=False).logits
    other = ids_BS.clone()
    other[0, 5:] = 40
    torch.testing.assert_close(model(input_ids=other, use_cache=False).logits[:, :5], logits[:, :5])
    model(input_ids=ids_BS, labels=ids_BS, use_cache=False).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
