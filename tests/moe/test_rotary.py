"""Which families' rotary embedding is ours to compute, and that it computes theirs."""

import sys

import pytest
import torch

from moe.family_table import FAMILIES
from moe.rotary import _can, _Fused, fuse_rotary
from tests.moe.rotary_case import cases, compare, module_of


@pytest.fixture(autouse=True)
def _theirs_again():
    yield
    for module in list(sys.modules.values()):
        function = getattr(module, "__dict__", {}).get("apply_rotary_pos_emb")
        if isinstance(function, _Fused):
            module.apply_rotary_pos_emb = function.theirs


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_families_that_turn_halves_are_fused(tiny_family, family):
    model = tiny_family(family)
    module, halves = module_of(model), family not in ("deepseek_v2", "gpt_oss")
    if family == "deepseek_v2":
        assert not hasattr(module, "apply_rotary_pos_emb")  # it multiplies complex numbers
    assert [fuse_rotary(model), fuse_rotary(model)] == [halves, halves]
    assert isinstance(getattr(module, "apply_rotary_pos_emb", None), _Fused) == halves


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_a_fused_model_calls_it_and_computes_the_same_where_the_kernel_cannot_run(tiny_family, monkeypatch, family):
    model, ids_BT = tiny_family(family), torch.randint(0, 64, (2, 16))
    want = model(input_ids=ids_BT, use_cache=False).logits
    assert fuse_rotary(model) == 1
    called = []
    monkeypatch.setattr("moe.rotary._can", lambda *tensors: called.append(_can(*tensors)) or called[-1])
    assert torch.equal(model(input_ids=ids_BT, use_cache=False).logits, want)
    assert called == [False] * model.config.num_hidden_layers


def test_other_shapes_and_types_are_left_to_the_family(monkeypatch):
    monkeypatch.setattr("moe.rotary.runs_triton", lambda device: True)
    q, k = torch.rand(2, 4, 5, 8).bfloat16(), torch.rand(2, 2, 5, 8).bfloat16()
    cos = torch.rand(1, 5, 8).bfloat16()
    assert _can(q, k, cos, cos)
    assert _can(q, k, cos.expand(2, 5, 8).contiguous(), cos.expand(2, 5, 8).contiguous())
    assert not _can(q, k, cos.expand(2, 5, 8), cos.expand(2, 5, 8))
    assert not _can(q.float(), k, cos, cos)
    assert not _can(q.float(), k.float(), cos.float(), cos.float())
    assert not _can(q, k[..., :4], cos, cos)
    assert not _can(q, k, cos[..., :4], cos[..., :4])
    assert not _can(q, k, cos[:, :4], cos[:, :4])
    assert not _can(q, k, cos[0], cos[0])
    assert not _can(q[0], k[0], cos, cos)
    assert not _can(q, k, cos.clone().requires_grad_(), cos)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", cases())
def test_the_kernel_gives_the_familys_bits_with_gradients(tiny_family, case):
    for dtype in (torch.bfloat16, torch.float16):
        compare(module_of(tiny_family("qwen3_moe")), case, dtype, "cuda")
