"""The fused norm is the module's own, with gradients, in every family."""

import copy

import pytest
import torch

from moe.family_table import FAMILIES
from moe.norms import fuse_norms

IDS_BT = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(3))


def distance(got, want):
    """Norm of the difference over norm of the reference."""
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_fused_model_has_the_loss_and_gradients_of_its_family(tiny_family, family):
    theirs = tiny_family(family)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in theirs.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.uniform_(0.5, 1.5, generator=generator)
    ours = copy.deepcopy(theirs)
    assert fuse_norms(ours) == sum("RMSNorm" in type(module).__name__ for module in theirs.modules()) >= 5
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    losses = [model(input_ids=IDS_BT, labels=IDS_BT, use_cache=False).loss for model in (theirs, ours)]
    for loss in losses:
        loss.backward()
    assert distance(losses[1].detach(), losses[0].detach()) < 1e-6
    for (name, want), (_, got) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        if want.grad is not None:
            assert distance(got.grad, want.grad) < 1e-4, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("rows", "width"), [(8192, 1024), (131_072, 64), (3, 2048)])
def test_in_bf16_it_is_as_near_as_the_module_and_repeats(tiny_family, rows, width):
    norm = next(m for m in tiny_family("qwen3_moe").modules() if "RMSNorm" in type(m).__name__)
    norm.weight.data = torch.empty(width).uniform_(0.5, 1.5)
    x, direction = torch.randn(rows, width), torch.randn(rows, width)

    def run(module, dtype, device):
        module = copy.deepcopy(module).to(device, dtype)
        mine = x.bfloat16().to(device, dtype).requires_grad_()
        out = module(mine)
        out.backward(direction.bfloat16().to(device, dtype))
        return [t.detach().cpu() for t in (out, mine.grad, module.weight.grad)]

    norm.weight.data = norm.weight.data.bfloat16().float()
    want, theirs = run(norm, torch.float64, "cpu"), run(norm, torch.bfloat16, "cuda")
    assert fuse_norms(norm) == 1
    ours, again = (run(norm, torch.bfloat16, "cuda") for _ in range(2))
    for reference, plain, fused, repeated in zip(want, theirs, ours, again, strict=True):
        assert torch.equal(fused, repeated)
        assert distance(fused, reference) <= 1.1 * distance(plain, reference)
