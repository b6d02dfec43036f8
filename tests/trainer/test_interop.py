"""DeepSpeed folders without DeepSpeed's engine: a state of any layout out and in again; what is torn is named."""

from __future__ import annotations

import math
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpointing.deepspeed_format import DeepSpeedFormatError, expert_file, optimizer_file, read_folder, resolve_tag
from checkpointing.materialise import sections_of
from checkpointing.state.buffers import StateBuffer, StateSpan
from checkpointing.state.partitions import describe_partitions
from checkpointing.store import Checkpoint, write_checkpoint
from checkpointing.units import Range
from moe.refs import TensorAddress
from tests.checkpointing.gathered import gathered_hash
from trainer.cli import main
from trainer.engine import CHECKPOINT_CLASSES
from trainer.interop import ForeignFolderError, _write_deepspeed, write_imported
from trainer.progress import Progress
from trainer.recipe import load_recipe, recipe_to_yaml

EXPERTS = 4
DENSE = {"model.embed_tokens.weight": (5, 3), "model.norm.weight": (3,)}
STACKED = {
    f"model.layers.{layer}.mlp.experts.{tensor}": (EXPERTS, *shape)
    for layer in (0, 2)
    for tensor, shape in (("gate_up_proj", (4, 3)), ("down_proj", (3, 2)))
}
RECIPE = load_recipe("tests/drills/drill.yaml")


def addresses(ep: int, ep_rank: int) -> dict[str, TensorAddress]:
    """The group of stacked tensors as one rank has them."""
    local = EXPERTS // ep
    return {
        param: TensorAddress(
            param, (local, *shape[1:]), int(param.split(".")[2]), param.rpartition(".")[2], ep_rank * local, EXPERTS
        )
        for param, shape in STACKED.items()
    }


def partition(group: dict[str, TensorAddress], share: int, shares: int) -> tuple[int, list[tuple[str, int, int, int]]]:
    """Elements of one rank's equal share of a flat group, padded at the end, and its spans: as ZeRO cuts it."""
    total = sum(math.prod(a.shape) for a in group.values())
    size = -(-total // shares)
    spans, at = [], 0
    for address in group.values():
        for unit in address.units():
            lo, hi = max(at, share * size), min(at + unit.stop - unit.start, (share + 1) * size)
            if lo < hi:
                spans.append((unit.unit, lo - at, hi - at, lo - share * size))
            at += unit.stop - unit.start
    return size, spans


def written(folder: Path, world: int, ep: int, seed: int = 0, dtype: str = "float32") -> Checkpoint:
    generator = torch.Generator().manual_seed(seed)
    dense = {param: TensorAddress(param, shape) for param, shape in DENSE.items()}
    values: dict[tuple[str, str], torch.Tensor] = {}
    sections, described = {}, {}
    for rank in range(world):
        groups = [(dense | addresses(1, 0), rank, world, {})] if ep == 1 else [
            (dense, rank, world, {}),
            (addresses(ep, rank % ep), rank // ep, world // ep, {"moe": True, "name": f"ep_size_{ep}"}),
        ]  # fmt: skip
        buffers, masters = [], []
        for number, (group, share, shares, _) in enumerate(groups):
            size, spans = partition(group, share, shares)
            for kind in ("master", "exp_avg", "exp_avg_sq"):
                flat = torch.zeros(size)
                for unit, lo, hi, offset in spans:
                    whole = values.setdefault((unit, kind), torch.randn(60, generator=generator))
                    flat[offset : offset + hi - lo] = whole[lo:hi]
                named = tuple(StateSpan(Range(unit, kind, lo, hi), offset) for unit, lo, hi, offset in spans)
                buffers.append(StateBuffer(f"group{number}.{kind}", flat, named))
                if kind == "master":
                    masters.append(torch.nn.Parameter(flat))
        optimizer = torch.optim.AdamW(
            [{"params": [flat], **facts} for flat, (*_, facts) in zip(masters, groups, strict=True)], fused=True
        )
        progress = Progress(6, 48, "chain", [5.0] * len(groups))
        sections[f"dp{rank:04d}"] = sections_of(buffers, {"progress": progress.dump()})
        described[f"dp{rank:04d}"] = describe_partitions(buffers, optimizer)
    tensors: dict[str, Any] = {}
    for address in [*dense.values(), *addresses(1, 0).values()]:
        for i, unit in enumerate(address.units()):
            tensors[unit.unit] = {
                "param": address.param, "shape": list(address.global_shape), "dtype": dtype,
                "expert": i if address.is_expert else None, "elements": unit.stop - unit.start,
            }  # fmt: skip
    metadata = {"world": world, "ep": ep, "zero": 2, "dtype": dtype, "recipe": "r"}
    return Checkpoint.open(write_checkpoint(folder, 6, sections, tensors, metadata, described=described))


def exported(checkpoint: Checkpoint, out: Path) -> Path:
    tag = out / "global_step6"
    tag.mkdir(parents=True)
    _write_deepspeed(checkpoint, RECIPE, tag)
    (out / "latest").write_text(tag.name)
    return tag


@settings(max_examples=12, deadline=None)
@given(st.sampled_from([(1, 1), (3, 1), (2, 2), (4, 2), (4, 4), (6, 2)]), st.sampled_from(["float32", "bfloat16"]))
def test_every_layout_comes_back_bit_equal(where: tuple[int, int], dtype: str) -> None:
    world, ep = where
    with TemporaryDirectory() as folder:
        checkpoint = written(Path(folder, "ours"), world, ep, dtype=dtype)
        tag = exported(checkpoint, Path(folder, "theirs"))
        read = read_folder(tag, CHECKPOINT_CLASSES)
        again = Checkpoint.open(write_imported(read, Path(folder, "again")))
        assert gathered_hash(again) == gathered_hash(checkpoint)
        assert again.manifest["tensors"] == checkpoint.manifest["tensors"]
        assert (read.ep, len(read.ranks)) == (ep, world)
        for coordinate in again.manifest["coordinates"]:
            progress = Progress()
            progress.load(again.extras(coordinate)["progress"])
            assert (progress.step, progress.samples, progress.optimizer_steps) == (6, 48, [5.0])


def test_a_tied_head_is_among_the_weights_as_state_dicts_have_it(tmp_path: Path) -> None:
    read = read_folder(exported(written(tmp_path / "ours", 2, 2), tmp_path / "theirs"), CHECKPOINT_CLASSES)
    module = read.model["module"]
    assert torch.equal(module["lm_head.weight"], module["model.embed_tokens.weight"])
    assert read.model["shared_params"] == {"lm_head.weight": "model.embed_tokens.weight"}


def test_layouts_hold_the_same_state(tmp_path: Path) -> None:
    """What the tests above compare is not empty: the hash is of whole units, and differs with the values."""
    hashes = [gathered_hash(written(tmp_path / str(seed), 2, 2, seed=seed)) for seed in (0, 1)]
    assert hashes[0] != hashes[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    exported(written(tmp_path / "ours", 4, 2), tmp_path / "theirs")
    return tmp_path / "theirs"


def rewrite(file: Path, change: Callable[[Any], object]) -> None:
    loaded = torch.load(file, weights_only=False)
    change(loaded)
    torch.save(loaded, file)


def swap(tag: Path) -> None:
    first, second = (tag / expert_file(1, e) for e in (0, 3))
    first.rename(tag / "aside")
    second.rename(first)
    (tag / "aside").rename(second)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("/tmp/planaria-evil"),)


def poison(tag: Path) -> None:
    with (tag / optimizer_file(1, False)).open("wb") as file:
        pickle.dump({"optimizer_state_dict": Evil()}, file)


def other_step(states: Any) -> None:
    states["optimizer_state_dict"]["base_optimizer_state"]["state"][1]["step"] += 1


def other_weight(states: Any) -> None:
    next(iter(states.values())).view(-1)[0] += 1


def lost_slice(states: Any) -> None:
    states["optimizer_state_dict"]["param_slice_mappings"][1].popitem()


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda tag: (tag / optimizer_file(2, False)).unlink(), r"lacks zero_pp_rank_2_mp"),
        (lambda tag: (tag / expert_file(1, 3)).unlink(), r"lacks layer_1_expert_3_mp"),
        (lambda tag: shutil.copy(tag / optimizer_file(0, False), tag / optimizer_file(4, False)), "than its 4 ranks"),
        (swap, "which is not that expert's"),
        (poison, "could run any code"),
        (lambda tag: (tag / optimizer_file(1, False)).write_bytes(b"cut off"), "damaged"),
        (lambda tag: rewrite(tag / optimizer_file(3, False), other_step), r"optimizer steps \[5\.0, 6\.0\]"),
        (lambda tag: rewrite(tag / optimizer_file(3, False), lost_slice), r"ranks \[1, 3\] hold \d+ elements of"),
        (lambda tag: rewrite(tag / expert_file(0, 2), other_weight), "not the cast of its masters"),
    ],
)  # fmt: skip
def test_torn_and_mixed_folders_are_refused(folder: Path, harm: Callable[[Path], object], words: str) -> None:
    harm(folder / "global_step6")
    with pytest.raises((DeepSpeedFormatError, ForeignFolderError), match=words):
        write_imported(read_folder(resolve_tag(folder), CHECKPOINT_CLASSES), folder / "again")
    assert not (folder / "again").exists()
    assert not Path("/tmp/planaria-evil").exists()


def test_tags_are_found_or_asked_for(folder: Path) -> None:
    tag = folder / "global_step6"
    assert resolve_tag(folder) == resolve_tag(tag) == resolve_tag(folder, "global_step6") == tag
    with pytest.raises(DeepSpeedFormatError, match=r"global_step9.*tags there: global_step6"):
        resolve_tag(folder, "global_step9")
    (folder / "latest").write_text("global_step9")
    with pytest.raises(DeepSpeedFormatError, match=r"names 'global_step9'.*stale"):
        resolve_tag(folder)
    (folder / "latest").unlink()
    with pytest.raises(DeepSpeedFormatError, match="no file 'latest'"):
        resolve_tag(folder)


def test_the_commands_round_trip_and_refuse_to_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    checkpoint = written(run / "checkpoints", 2, 2)
    (run / "recipe.yaml").write_text(recipe_to_yaml(RECIPE))
    out, back = str(tmp_path / "ds"), str(tmp_path / "back")
    assert main(["checkpoint", "export", f"{run}:6", out, "--deepspeed"]) == 0
    assert main(["checkpoint", "import", out, back]) == 0
    assert gathered_hash(Checkpoint.open(tmp_path / "back/checkpoints/step-6")) == gathered_hash(checkpoint)
    assert "2 workers, ep 2, ZeRO-2 loads tag global_step6" in capsys.readouterr().out
    assert main(["checkpoint", "export", str(run), out, "--deepspeed"]) == 2
    assert main(["checkpoint", "import", out, back]) == 2
    assert main(["checkpoint", "import", out, str(run)]) == 2
    assert main(["checkpoint", "export", f"{run}:5", str(tmp_path / "x"), "--deepspeed"]) == 2
    assert main(["checkpoint", "export", f"{run}:5", str(tmp_path / "x"), "--hf"]) == 2
    refusals = capsys.readouterr().err
    said = ("not empty", "step-6 exists", "is a run of ours", "give a new folder", "step 5 of", "step 5 is not there")
    for words in said:
        assert words in refusals
    assert not (tmp_path / "x").exists()
