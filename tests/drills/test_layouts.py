"""One state through several layouts and through DeepSpeed's own folders, as a user would do it.

Each run begins with the checkpoint of the one before. What it then has in its live optimizer is compared with an
independent reading of the files.
"""

import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from trainer.cli import main

pytestmark = [pytest.mark.drill, pytest.mark.slow]
KINDS = {"master", "exp_avg", "exp_avg_sq"}
CHAIN = [("two", 2, 2, 1), ("one", 1, 1, 1), ("four", 4, 2, 2), ("back", 2, 2, 1)]  # name, workers, ep, zero
EXPERTS = 4
ONLY_AT_THE_END = "checkpoint.disk={every: 0, final: true}"


def joined(parts):
    return {name: np.concatenate([v for _, v in sorted(found, key=lambda x: x[0])]) for name, found in parts.items()}


def gathered(folder):
    """Every kind of every unit, whole, from a checkpoint's files."""
    parts = {}
    for file in folder.glob("*.safetensors"):
        for key, values in load_file(file).items():
            if not key.startswith("extras/"):
                unit, _, rest = key.partition("#")
                kind, _, bounds = rest.rstrip(")").partition("[")
                parts.setdefault((unit, kind), []).append((int(bounds.split(":")[0]), values))
    return joined(parts)


def dumped(folder):
    """What each rank wrote down, and every kind of every unit, whole."""
    ranks, parts = [torch.load(file) for file in sorted(folder.iterdir())], {}
    for rank in ranks:
        for unit, kind, lo, values in rank["spans"]:
            parts.setdefault((unit, kind), []).append((lo, values.numpy()))
    return ranks, joined(parts)


def assert_equal(got, wanted):
    assert {kind for _, kind in wanted} == KINDS
    assert got.keys() == wanted.keys()
    for key, values in wanted.items():
        assert values.tobytes() == got[key].tobytes(), key
    assert np.abs(wanted["L01.E003.down_proj", "exp_avg_sq"]).max() > 0, "nothing was trained"


def layout(workers, ep, zero):
    return [f"parallel.workers={workers}", f"parallel.ep={ep}", f"parallel.zero={zero}", "train.warmup_steps=0"]


@pytest.fixture(scope="module")
def chain(run_layout_workers, folder):
    """Each link's run folder, trained two steps further than the one before."""
    runs, begin = {}, []
    for number, (name, *where) in enumerate(CHAIN, 1):
        overrides = [*layout(*where), f"train.steps={2 * number}", ONLY_AT_THE_END, *begin]
        dump = folder / f"dump-{name}"
        runs[name] = run_layout_workers(f"layout-{name}", overrides, where[0], "recover", dump)
        begin = [f"checkpoint.load_from={runs[name]}"]
    return runs


@pytest.mark.parametrize("link", [1, 2, 3])
def test_masters_and_moments_are_bit_equal_in_the_next_layout(chain, folder, link):
    name, workers, ep, _ = CHAIN[link]
    wanted = gathered(chain[CHAIN[link - 1][0]] / "checkpoints" / f"step-{2 * link}")
    ranks, got = dumped(folder / f"dump-{name}")
    assert_equal(got, wanted)
    assert len(ranks) == workers
    for number, rank in enumerate(ranks):
        assert (rank["step"], rank["samples"]) == (2 * link, 16 * link)
        assert set(rank["counts"]) == {2.0 * link}
        for path, weight in rank["weights"].items():
            assert np.array_equal(weight.numpy().ravel(), expected_weight(wanted, path, number % ep, ep)), path
    assert len({rank["rng"].numpy().tobytes() for rank in ranks}) == workers, "ranks share a random stream"


def expected_weight(wanted, path, ep_rank, ep):
    if ".experts." not in path:
        return wanted[path, "master"]
    layer, tensor = int(path.split(".")[2]), path.rpartition(".")[2]
    mine = range(ep_rank * EXPERTS // ep, (ep_rank + 1) * EXPERTS // ep)
    return np.concatenate([wanted[f"L{layer:02d}.E{expert:03d}.{tensor}", "master"] for expert in mine])


@pytest.fixture(scope="module")
def through_deepspeed(chain, run_layout_workers, folder):
    """The first link's state, exported, loaded by DeepSpeed's engine, trained a step and saved by it."""
    exported, saved = folder / "ds-exported", folder / "ds-saved"
    assert main(["checkpoint", "export", f"{chain['two']}:2", str(exported), "--deepspeed"]) == 0
    nothing_kept = "checkpoint={mode: dense, memory: {enabled: false}, disk: {every: 0, final: false}}"
    overrides = [*layout(2, 2, 1), "train.steps=1", nothing_kept]
    run_layout_workers("layout-ds", overrides, 2, "deepspeed", folder / "dump-ds", exported, saved)
    return saved


def test_deepspeed_loads_an_export_with_equal_masters_and_moments(chain, through_deepspeed, folder):
    wanted = gathered(chain["two"] / "checkpoints" / "step-2")
    ranks, got = dumped(folder / "dump-ds" / "loaded")
    assert_equal(got, wanted)
    for number, rank in enumerate(ranks):
        assert set(rank["counts"]) == {2.0}
        for path, weight in rank["weights"].items():
            assert np.array_equal(weight.numpy().ravel(), expected_weight(wanted, path, number, 2)), path


def test_an_import_of_deepspeeds_own_save_has_equal_masters_in_any_layout(
    through_deepspeed, run_layout_workers, folder
):
    run = folder / "ds-imported"
    assert main(["checkpoint", "import", str(through_deepspeed), str(run)]) == 0
    assert main(["checkpoint", "verify", str(run)]) == 0
    _, wanted = dumped(folder / "dump-ds" / "saved")
    assert_equal(gathered(run / "checkpoints" / "step-3"), wanted)
    for workers, ep in ((1, 1), (2, 2)):
        out = folder / f"dump-imported-{ep}"
        overrides = [*layout(workers, ep, 2), "train.steps=4", ONLY_AT_THE_END, f"checkpoint.load_from={run}"]
        run_layout_workers(f"layout-imported-{ep}", overrides, workers, "recover", out)
        ranks, got = dumped(out)
        assert_equal(got, wanted)
        assert {(rank["step"], rank["samples"], *rank["counts"]) for rank in ranks} <= {
            (3, 24, *[3.0] * groups) for groups in (2, 3)
        }


@pytest.mark.parametrize(
    ("torn", "words"),
    [
        ("bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", "lacks"),
        ("layer_1_expert_3_mp_rank_00_model_states.pt", "lacks layer_1_expert_3"),
        ("latest", "names 'global_step9'"),
        ("swapped", "which is not that expert's"),
    ],
)
def test_torn_folders_are_refused(through_deepspeed, tmp_path, capsys, torn, words):
    broken = tmp_path / "broken"
    shutil.copytree(through_deepspeed, broken)
    tag = broken / "global_step3"
    if torn == "latest":
        (broken / "latest").write_text("global_step9")
    elif torn == "swapped":
        first, second = (tag / f"layer_0_expert_{e}_mp_rank_00_model_states.pt" for e in (0, 1))
        first.rename(tmp_path / "aside")
        second.rename(first)
        (tmp_path / "aside").rename(second)
    else:
        next(tag.glob(torn.removeprefix("bf16_") if not (tag / torn).exists() else torn)).unlink()
    assert main(["checkpoint", "import", str(broken), str(tmp_path / "run")]) == 2
    assert words in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_killed_run_recovers_from_its_own_memory(chain, start):
    """Begun elsewhere and killed in its first step: its own checkpoints win."""
    overrides = [*layout(2, 2, 2), "train.steps=5", f"checkpoint.load_from={chain['one']}", ONLY_AT_THE_END]
    job = start("layout-killed", overrides, kill="rank=1,step=5,at=optimizer")
    rows = job.finish()
    assert [row["step"] for row in rows if row["kind"] == "load_from"] == [4]
    plans = [(row["tier"], row["step"]) for row in rows if row["kind"] == "recovery_plan"]
    assert plans == [("fresh", -1), ("memory", 4)]
    assert "the course will not be bit-equal" in job.output.read_text()


def test_what_does_not_fit_is_refused_in_words(chain, start):
    source = f"checkpoint.load_from={chain['one']}"
    job = start(
        "layout-wider", ["train.steps=9", "parallel.zero=1", source, "model.moe_intermediate_size=24", "train.seed=3"]
    )
    assert job.wait() == 2
    text = job.output.read_text()
    assert "Traceback" not in text
    assert "train.seed: 0 in the checkpoint, 3 here" in text
    assert "L00.E000.down_proj: {" in text
