"""Two real DeepSpeed ranks train one adapter as a single process does, and see a cut-off one together."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lora.attach import attach
from lora.format import collect_adapter, save_adapter
from moe.context import batch_context
from moe.convert import convert
from tests.forked import run_ranks
from tests.lora.rank_cases import CASES, CUT_OFF, PLANS, context_of, file_of, is_dense
from tests.lora.train_ranks import train_all

WORLD = 2


@dataclass(frozen=True)
class Runs:
    """Adapter tensors by case and path: what they started from, and what one process made of them."""

    folder: Path
    start: dict[str, dict[str, Tensor]]
    one_process: dict[str, dict[str, Tensor]]


@pytest.fixture(scope="module")
def runs(tiny_moe, tiny_dense, tmp_path_factory) -> Runs:
    """The same three steps from B != 0, by one process and by two ranks under each ZeRO stage."""
    folder = tmp_path_factory.mktemp("ranks")
    tiny_moe().save_pretrained(folder / "base")
    tiny_dense().save_pretrained(folder / "dense")
    generator = torch.Generator().manual_seed(3)
    tokens_SBT = torch.randint(64, (3, 4, 16), generator=generator)
    torch.save(tokens_SBT, folder / "tokens.pt")
    models, starts = {}, {}
    for case, banks in CASES.items():
        models[case] = model = tiny_dense() if is_dense(case) else tiny_moe()
        attach(model, banks, [] if is_dense(case) else convert(model))
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if ".adapter." in path:
                    parameter.normal_(0, 0.2, generator=generator)
        starts[case] = {path: tensor.clone() for path, tensor in collect_adapter(model).items()}
        save_adapter(folder / f"adapter-{file_of(case)}", starts[case], banks, "")
    run_ranks(train_all, folder, folder)
    for model in models.values():
        train_here(model, tokens_SBT)
    return Runs(folder, starts, {case: collect_adapter(model) for case, model in models.items()})


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def train_here(model: nn.Module, tokens_SBT: Tensor) -> None:
    """Each rank's share as a micro-batch: losses of a batch's routing are not the sums of those of its parts."""
    optimizer = torch.optim.SGD(trained(model), lr=0.2)
    for tokens_BT in tokens_SBT:
        optimizer.zero_grad()
        for mine in tokens_BT.chunk(WORLD):
            with batch_context(context_of(mine, aux_scale=1 / WORLD)):
                (model(mine, labels=mine).loss / WORLD).backward()
        optimizer.step()


@pytest.fixture(scope="module")
def four(runs) -> Runs:
    """The same with four ranks, for what is planned there."""
    (runs.folder / "meet").unlink()
    run_ranks(train_all, runs.folder, runs.folder, world=4)
    return runs


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(("case", "ep"), PLANS[4])
def test_four_ranks_train_the_adapter_of_one_process(four, case, ep, stage):
    parts = [torch.load(four.folder / f"trained-{file_of(case, 4, ep)}-{stage}-{rank}.pt") for rank in range(4)]
    for path, want in four.one_process[case].items():
        pieces = [part[path] for part in parts]
        copies = [torch.cat(pieces[i : i + ep]) for i in range(0, 4, ep)] if pieces[0].shape != want.shape else pieces
        assert all(torch.equal(copy, copies[0]) for copy in copies), path
        moved = (want - four.start[case][path]).norm()
        assert moved > 0, path
        assert (copies[0] - want).norm() < 1e-4 * moved, path


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_the_adapter_of_one_process(runs, case, stage):
    parts = [torch.load(runs.folder / f"trained-{file_of(case)}-{stage}-{rank}.pt") for rank in range(WORLD)]
    for path, want in runs.one_process[case].items():
        if path not in parts[0]:  # of a trained adapter
            assert torch.equal(want, runs.start[case][path]), path
            continue
        pieces = [part[path] for part in parts]
        sharded = pieces[0].shape != want.shape
        got = torch.cat(pieces) if sharded else pieces[0]
        moved = (want - runs.start[case][path]).norm()
        assert moved > 0, path
        assert (got - want).norm() < 1e-4 * moved, path
        assert sharded or torch.equal(*pieces), path


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_every_adapter_of_every_rank_is_seen_to_train(runs, case, stage):
    for rank in range(WORLD):
        assert json.loads((runs.folder / f"result-{file_of(case)}-{stage}-{rank}.json").read_text())["done"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_ranks_judge_a_cut_off_adapter_alike(runs, stage):
    files = [runs.folder / f"result-{file_of(CUT_OFF)}-{stage}-{rank}.json" for rank in range(WORLD)]
    results = [json.loads(file.read_text()) for file in files]
    assert results[0] == results[1]  # else one would raise and the other wait in the next collective
    error = results[0]["error"]
    assert all(f"L00.E00{e}.adapter.down_proj.B" in error for e in range(4, 8))
    assert not any(innocent in error for innocent in ("L00.E003", "gate_up_proj", "L01"))
