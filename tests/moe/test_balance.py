"""Balance losses reach the gradient through the gate, and only when the loop asks for them."""

import torch

from moe.balance import inject, switch_loss
from moe.context import BatchContext, batch_context
from moe.convert import convert, observe_gates
from moe.stats import RoutingMeter


def test_balanced_routing_costs_top_k_and_a_collapsed_router_costs_more():
    uniform_TE = torch.full((8, 4), 0.25)
    spread_TK = torch.stack([torch.arange(8) % 4, (torch.arange(8) + 1) % 4], dim=1)
    assert float(switch_loss(uniform_TE, spread_TK)) == 2.0
    peaked_TE = torch.tensor([[0.7, 0.3, 0.0, 0.0]]).repeat(8, 1)
    collapsed_TK = torch.tensor([[0, 1]]).repeat(8, 1)
    torch.testing.assert_close(switch_loss(peaked_TE, collapsed_TK), torch.tensor(4.0))


def test_injection_leaves_the_output_and_adds_the_scaled_gradient():
    w = torch.tensor(3.0, requires_grad=True)
    y = w * 2
    with batch_context(BatchContext(aux_scale=0.5)):
        out = inject(y, w * w)
    assert torch.equal(out, y)
    out.backward()
    assert float(w.grad) == 2 + 0.5 * 2 * 3


def gate_gradients(model, balance_coef, context):
    blocks = convert(model)
    meter = RoutingMeter()
    observe_gates(blocks, meter, balance_coef)
    ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(1))
    with batch_context(context):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss, [block.gate.weight.grad for block in blocks], meter.take()


def test_the_gate_learns_from_the_injected_loss_of_every_layer(tiny_model):
    training = BatchContext(aux_scale=1.0)
    plain_loss, plain, stats = gate_gradients(tiny_model(), 0.0, training)
    loss, balanced, _ = gate_gradients(tiny_model(), 0.1, training)
    assert torch.equal(loss, plain_loss), "the reported loss must not contain the auxiliary one"
    assert all(not torch.equal(a, b) for a, b in zip(plain, balanced, strict=True))
    assert stats.counts_ME.sum().item() == 2 * 2 * 16 * 2
    assert stats.layers == (0, 1)

    # By hand, for the last layer, whose gate only feeds its own auxiliary loss: d(loss + aux) = d loss + d aux.
    model = tiny_model()
    blocks = convert(model)
    kept = []
    blocks[-1].gate.register_forward_hook(lambda _m, _a, out: kept.append((out[0], out[2])))
    ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(1))
    total = model(input_ids=ids, labels=ids).loss
    logits_TE, index_TK = kept[0]
    (total + 0.1 * switch_loss(logits_TE.softmax(-1), index_TK)).backward()
    torch.testing.assert_close(balanced[-1], blocks[-1].gate.weight.grad)


def test_evaluation_is_left_alone(tiny_model):
    _, plain, _ = gate_gradients(tiny_model(), 0.0, BatchContext(balance=False))
    _, balanced, stats = gate_gradients(tiny_model(), 0.5, BatchContext(balance=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, balanced, strict=True))
    assert stats is None
