"""What only a GPU shows of an expert layer: what the host waits for, and that bits do not depend on guesses."""

import pytest
import torch
import torch.distributed as dist

from moe import exchange as exchange_module
from moe.dispatch import EXCHANGES, Routed, mix_everywhere
from moe.experts import Experts
from moe.guests import mix_with_guests
from moe.kernels import batched
from moe.kernels.stack import Stack
from moe.traffic import Traffic, traffic_of
from tests.moe.test_dispatch import METHODS, Noted


def layer_on_a_gpu():
    device = torch.device("cuda")
    experts = Experts(
        torch.nn.Parameter(torch.randn(8, 64, 32, device=device, dtype=torch.bfloat16)),
        torch.nn.Parameter(torch.randn(8, 32, 32, device=device, dtype=torch.bfloat16)),
        layer=0,
    )
    x = torch.randn(64, 32, device=device, dtype=torch.bfloat16, requires_grad=True)
    index = torch.rand(64, 8, device=device).argsort(1)[:, :2]
    return experts, Routed(x, index, torch.rand(64, 2, device=device, requires_grad=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nothing_is_read_from_a_gpu_with_one_rank():
    experts, routed = layer_on_a_gpu()

    def step():
        experts(routed.x_TH, routed.index_TK, routed.weights_TK).sum().backward()

    step()  # libraries may wait when they begin
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", [*METHODS, "guests"])
def test_a_gpu_is_waited_for_once_in_an_exchange(method, monkeypatch):
    """In a group of one rank, whose exchange is a real one of NCCL. The wait is for an event, which torch allows."""
    experts, routed = layer_on_a_gpu()
    noted = Noted(monkeypatch)
    noted.watch(exchange_module.Headcount, "read", "r")
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        traffic = traffic_of(group, 0)

        def layer():
            if method == "guests":
                stack = Stack(experts.gate_up_proj, experts.down_proj, None, None, experts.form)
                return mix_with_guests(batched, stack, routed.x_TH, routed.index_TK, routed.weights_TK, traffic)
            return mix_everywhere(EXCHANGES[method](8, group), experts.mix, routed)

        def step():
            layer().sum().backward()

        step()
        noted.taken()
        torch.cuda.set_sync_debug_mode("error")
        step()
        torch.cuda.set_sync_debug_mode("default")
        assert noted.taken() == "r"
        want = experts(routed.x_TH, routed.index_TK, routed.weights_TK)
        torch.testing.assert_close(layer(), want, rtol=1e-2, atol=1e-2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_bit_depends_on_how_many_pairs_were_expected():
    """Half of the choices have no expert here, so the early product has as many rows again behind its own, or too few.
    Rows per expert are on both sides of 128, where torch's product changes its tiles."""
    experts, _ = layer_on_a_gpu()
    draw = torch.Generator("cuda").manual_seed(0)
    index = torch.rand(600, 16, device="cuda", generator=draw).argsort(1)[:, :2]
    x = torch.randn(600, 32, device="cuda", generator=draw).to(torch.bfloat16).requires_grad_()
    weights = torch.rand(600, 2, device="cuda", generator=draw).requires_grad_()
    stack = Stack(experts.gate_up_proj, experts.down_proj, None, None, experts.form)
    leaves = (x, weights, experts.gate_up_proj, experts.down_proj)
    pairs, found = int((index < 8).sum()), []
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for expected in (0, pairs // 2, pairs, 2 * pairs):
            traffic = Traffic(dist.group.WORLD, rank=0, ranks=1, pairs=expected)
            out = mix_with_guests(batched, stack, x, index, weights, traffic)
            found.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    finally:
        dist.destroy_process_group()
    for other in found[1:]:
        assert all(torch.equal(one, same) for one, same in zip(found[0], other, strict=True))
