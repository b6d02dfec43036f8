"""Cases of the slot kernels; run by test_slot_kernels.py, interpreted where there is no GPU.

Shapes: T rows, K choices of each, P = T*K pairs, E experts, C slots, H hidden, I intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from inference.slot_kernels import combine, compute

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Case:
    x_TH: Tensor
    expert_TK: Tensor
    score_TK: Tensor
    gate_up_E2IH: Tensor
    down_EHI: Tensor

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        return (*self.expert_TK.shape, *self.down_EHI.shape)


def make(rows: int, choices: int, experts: int, hidden: int, inner: int, dtype=torch.float32, seed: int = 0) -> Case:
    g = torch.Generator().manual_seed(seed)
    expert = torch.stack([torch.randperm(experts, generator=g)[:choices] for _ in range(rows)])
    score = torch.rand(rows, choices, generator=g).to(dtype)
    x = torch.randn(rows, hidden, generator=g).to(dtype)
    gate_up = (torch.randn(experts, 2 * inner, hidden, generator=g) / hidden**0.5).to(dtype)
    down = (torch.randn(experts, hidden, inner, generator=g) / inner**0.5).to(dtype)
    return Case(*(t.to(DEVICE) for t in (x, expert, score, gate_up, down)))


def slots_of(case: Case, order: list[int], spare: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """The experts in ``order``, each in a slot of one block, as a bank's copy leaves them; spare slots are NaN."""
    _, _, experts, hidden, inner = case.sizes
    block_CN = torch.full((len(order) + spare, 3 * inner * hidden), float("nan"), dtype=case.x_TH.dtype, device=DEVICE)
    slot_E = torch.full((experts,), -1, dtype=torch.int32, device=DEVICE)
    for slot, expert in enumerate(order):
        slot_E[expert] = slot + spare
        block_CN[slot + spare] = torch.cat([case.gate_up_E2IH[expert].flatten(), case.down_EHI[expert].flatten()])
    cut = 2 * inner * hidden
    return slot_E, block_CN[:, :cut].unflatten(1, (2 * inner, hidden)), block_CN[:, cut:].unflatten(1, (hidden, inner))


def scratch(case: Case) -> tuple[Tensor, Tensor]:
    rows, choices, _, hidden, inner = case.sizes
    nan = float("nan")
    return torch.full((rows * choices, inner), nan, device=DEVICE), torch.full(
        (rows * choices, hidden), nan, device=DEVICE
    )


def run(case: Case, order: list[int]) -> tuple[Tensor, Tensor]:
    """(out [T,H], partial results [P,H]) with all experts in slots."""
    slot_E, gate_up, down = slots_of(case, order)
    a_PI, y_PH = scratch(case)
    compute(case.x_TH, case.expert_TK, case.score_TK, slot_E, gate_up, down, a_PI, y_PH)
    out_TH = torch.full_like(case.x_TH, float("nan"))
    combine(y_PH, case.expert_TK, out_TH)
    return out_TH, y_PH


def reference(case: Case) -> Tensor:
    """[T,H] in float64."""
    out_TH = torch.zeros_like(case.x_TH, dtype=torch.float64)
    for t, k in torch.cartesian_prod(*(torch.arange(n) for n in case.expert_TK.shape)).tolist():
        expert = int(case.expert_TK[t, k])
        gate, up = (case.gate_up_E2IH[expert].double() @ case.x_TH[t].double()).chunk(2)
        acted = torch.nn.functional.silu(gate) * up
        out_TH[t] += case.score_TK[t, k].double() * (case.down_EHI[expert].double() @ acted)
    return out_TH


SIZES = [(1, 2, 4, 64, 32), (3, 3, 5, 70, 33), (2, 1, 3, 300, 17), (5, 4, 9, 31, 270)]


@pytest.mark.parametrize("sizes", SIZES)
def test_as_the_formula(sizes):
    case = make(*sizes)
    out_TH, _ = run(case, list(range(sizes[2])))
    want = reference(case)
    assert (out_TH.double() - want).norm() < 1e-5 * want.norm()


def test_bf16_rounds_once():
    case = make(2, 4, 8, 128, 48, torch.bfloat16)
    out_TH, _ = run(case, list(range(8)))
    want = reference(case)
    # Sums are in fp32: what is left is one rounding, less than a unit in the last place (the interpreter cuts off).
    assert ((out_TH.double() - want).abs() <= want.abs() * 2**-7 + 1e-5).all()


def test_slots_do_not_reach_the_bits():
    case = make(3, 3, 6, 70, 33)
    first, _ = run(case, list(range(6)))
    for seed in range(3):
        order = torch.randperm(6, generator=torch.Generator().manual_seed(seed)).tolist()
        assert torch.equal(first, run(case, order)[0])


def test_launches_and_lanes_do_not_reach_the_bits():
    case = make(4, 3, 6, 70, 33)
    whole, whole_PH = run(case, list(range(6)))
    resident, fetched, away = [4, 0], [5, 1], [2, 3]
    a_PI, y_PH = scratch(case)
    for part in (resident, fetched):
        slot_E, gate_up, down = slots_of(case, part)
        compute(case.x_TH, case.expert_TK, case.score_TK, slot_E, gate_up, down, a_PI, y_PH)
    elsewhere_E = torch.zeros(6, dtype=torch.int32, device=DEVICE)
    elsewhere_E[away] = 1
    gone_P = torch.isin(case.expert_TK, torch.tensor(away, device=DEVICE)).flatten()
    assert torch.equal(y_PH.isnan().all(1), gone_P), "pairs without a slot are skipped, all others written"
    other_PH = torch.where(gone_P[:, None], whole_PH, float("nan"))
    out_TH = torch.full_like(case.x_TH, float("nan"))
    combine(y_PH, case.expert_TK, out_TH, elsewhere_E, other_PH)
    assert torch.equal(out_TH, whole)


def test_company_does_not_reach_the_bits():
    case = make(4, 3, 6, 70, 33)
    whole, _ = run(case, list(range(6)))
    for t in range(4):
        one = Case(
            case.x_TH[t : t + 1], case.expert_TK[t : t + 1], case.score_TK[t : t + 1], case.gate_up_E2IH, case.down_EHI
        )
        assert torch.equal(run(one, list(range(6)))[0], whole[t : t + 1])


def test_sums_in_ascending_order_of_expert():
    case = make(6, 4, 9, 31, 20)
    out_TH, y_PH = run(case, list(range(9)))
    y_TKH = y_PH.unflatten(0, (6, 4))
    want = torch.zeros_like(out_TH)
    for place in range(4):
        want += y_TKH[torch.arange(6), case.expert_TK.argsort(dim=1)[:, place].cpu()]
    assert torch.equal(out_TH, want)
