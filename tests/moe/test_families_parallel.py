"""Two ranks that share the experts of a model against transformers in one process, for every family."""

import pytest
import torch

from moe.families import find_moe_blocks
from moe.family_table import FAMILIES
from tests.moe.family_worker import LR, batches


@pytest.fixture(scope="module")
def batches_SBT():
    return batches()


@pytest.fixture(scope="module")
def reports(two_ranks):
    """What each rank saw."""
    return [torch.load(two_ranks / f"families-{rank}.pt") for rank in range(2)]


def reference(model, batches_SBT):
    chosen = []
    blocks = find_moe_blocks(model)
    for block in blocks:
        block.gate.register_forward_hook(lambda _m, _a, out: chosen.append(out[-1]))
    optimizer, losses, first = torch.optim.SGD(model.parameters(), lr=LR), [], {}
    for ids_BT in batches_SBT:
        optimizer.zero_grad()
        loss = model(input_ids=ids_BT, labels=ids_BT).loss
        loss.backward()
        first = first or {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        optimizer.step()
        losses.append(loss.item())
    return losses, first, chosen[: len(blocks)]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_two_ranks_route_and_learn_as_one_process(tiny_family, reports, batches_SBT, family):
    losses, gradients, chosen = reference(tiny_family(family), batches_SBT)
    ranks = [report[family] for report in reports]
    for layer, whole_TK in enumerate(chosen):
        assert torch.equal(torch.cat([rank["chosen"][layer] for rank in ranks]), whole_TK)
    assert len(ranks[0]["experts"]) >= 4
    for name, want in gradients.items():
        halves = [rank["gradients"][name] for rank in ranks]
        got = torch.cat(halves) if name in ranks[0]["experts"] else halves[0]
        assert float((got - want).norm() / want.norm()) <= 1e-6, name
    for rank in ranks:
        assert rank["losses"] == pytest.approx(losses, rel=1e-5)
    assert losses[-1] < losses[0] - 0.05, "nothing was learned: the comparison would be empty"
