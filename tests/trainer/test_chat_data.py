"""Chat rows become rows of tokens of which nothing is lost without being counted."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lora.config import BankConfig
from lora.presets import expand
from trainer import chat_data, evaluation
from trainer.batches import labels_of_step, make_batch, training_rows
from trainer.chat_data import IGNORED, ChatDataset
from trainer.data import DataBundle, load_section
from trainer.data_rules import task_problem
from trainer.documents import DataError
from trainer.schema import DataSection, TokenizerSection

BYTES = TokenizerSection(kind="bytes", vocab_size=257)


def rows_of(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"q{i}", "completion": "a" * (1 + i * 7 % 23), "kind": "xy"[i % 2]} for i in range(count)]


def load(folder: Path, rows: list[dict[str, Any]], **more: Any) -> DataBundle:
    path = folder / "chat.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    fields = {"sequence_length": 64, "heldout_fraction": 0.2, "packing": True, "overlong": "truncate", **more}
    data = DataSection(
        source="files", include=(str(path),), tokenizer=BYTES, format="chat", chat_template="plain", **fields
    )
    return load_section(data, cache_root=folder / "cache")


def samples_of(part: Any) -> dict[str, tuple[str, str]]:
    """By place: the text, and the part of it that has loss."""
    assert isinstance(part, ChatDataset)
    found = {}
    for index in range(len(part)):
        row = part[index]
        assert int((row.labels_S != IGNORED).sum()) == part.weights[index] > 0
        assert np.array_equal(row.labels_S[row.labels_S != IGNORED], row.ids_S[row.labels_S != IGNORED])
        assert row.mask_S.tolist() == sorted(row.mask_S.tolist(), reverse=True)
        for number, place in enumerate(row.places):
            here = row.segment_S == number
            assert row.position_S[here].tolist() == list(range(int(here.sum())))
            assert row.labels_S[here][0] == IGNORED
            texts = (row.ids_S[here], row.ids_S[here & (row.labels_S != IGNORED)])
            found[place] = tuple(bytes(ids.clip(max=255).astype(np.uint8)).decode("latin1") for ids in texts)
    return found


@pytest.mark.parametrize("packing", [True, False])
def test_every_sample_is_in_one_part_once_and_whole(tmp_path: Path, packing: bool) -> None:
    rows = rows_of(40)
    bundle = load(tmp_path, rows, packing=packing)
    train, heldout = samples_of(bundle.train), samples_of(bundle.heldout)
    assert not train.keys() & heldout.keys()
    got = train | heldout
    assert got == {
        f"chat.jsonl:{i + 1}": (f"User:\n{r['prompt']}\nAssistant:\n{r['completion']}\xff\n", f"{r['completion']}\xff")
        for i, r in enumerate(rows)
    }
    assert (bundle.train_documents, bundle.heldout_documents) == (len(train), len(heldout))
    assert (len(bundle.train) < len(train)) == packing
    chat = bundle.chat["train"]
    assert chat["tokens"] == sum(len(text) for text, _ in train.values())
    assert chat["label_tokens"] == sum(len(learnt) for _, learnt in train.values())
    assert chat["padding"] == len(bundle.train) * 64 - chat["tokens"]
    assert bundle.chat["unread_keys"] == ["kind"]


def test_what_is_dropped_or_cut_is_counted_with_its_place(tmp_path: Path) -> None:
    odd = [
        {"prompt": "long", "completion": "b" * 80},
        {"prompt": "p" * 90, "completion": "behind"},
        {"prompt": "empty", "completion": " "},
        {"prompt": [{"role": "user", "content": "no answer"}], "completion": [{"role": "user", "content": "either"}]},
        {"prompt": [{"role": "user", "content": "a"}], "completion": [
            {"role": "assistant", "content": "b", "weight": 0}, {"role": "user", "content": "left"}]},
    ]  # fmt: skip
    bundle = load(tmp_path, odd + rows_of(6), heldout_fraction=0.01)
    both = [bundle.chat[part] for part in ("train", "heldout")]
    count = {name: sum(part[name] for part in both) for name in both[0] if isinstance(both[0][name], int)}
    dropped = {why: n for part in both for why, n in part["dropped"].items()}
    assert dropped == {
        "answer behind the cut": 1, "empty answer": 1, "no answer": 1, "no answer to learn from": 1,
    }  # fmt: skip
    whole = len("User:\nlong\nAssistant:\n") + 80 + 2
    assert (count["rows_read"], count["samples"]) == (11, 7)
    assert (count["truncated"], count["tokens_cut"], count["label_tokens_cut"]) == (1, whole - 64, whole - 64 - 1)
    assert (count["empty_answers"], count["turns_cut"]) == (1, 1)
    places = sorted(place for part in both for place in part["dropped_places"])
    assert [place.rpartition("/")[2] for place in places] == [
        "chat.jsonl:2 (answer behind the cut)", "chat.jsonl:3 (empty answer)", "chat.jsonl:4 (no answer)",
        "chat.jsonl:5 (no answer to learn from)",
    ]  # fmt: skip
    text = "\n".join(chat_data.told(bundle.chat, 64))
    assert "truncated 1 (40 tokens cut, 39 of answers)" in text
    assert "chat.jsonl:2 (answer behind the cut)" in text
    cut = [row for row in (bundle.train[i] for i in range(len(bundle.train))) if any(row.cut)]
    assert [row.cut for row in cut] == [(whole - 64,)]
    dropping = load(tmp_path, odd + rows_of(6), heldout_fraction=0.01, overlong="drop")
    assert sum(dropping.chat[part]["dropped"].get("too long", 0) for part in ("train", "heldout")) == 2
    assert dropping.key != bundle.key


def test_rows_in_both_parts_are_told(tmp_path: Path) -> None:
    bundle = load(tmp_path, rows_of(10) * 3, heldout_fraction=0.3)
    assert 0 < bundle.chat["also_held_out"] < 30
    text = "\n".join(chat_data.told(bundle.chat, 64))
    assert f"{bundle.chat['also_held_out']} rows of the training part are also held out" in text
    assert "also held out" not in "\n".join(chat_data.told(load(tmp_path, rows_of(20)).chat, 64))


def test_tasks_are_numbered_in_sorted_order_over_both_parts(tmp_path: Path) -> None:
    rows = [{**row, "kind": kind} for row, kind in zip(rows_of(30), ["zeta", "alpha", "10"] * 10, strict=True)]
    bundle = load(tmp_path, rows, task_key="kind")
    assert bundle.chat["tasks"] == ["10", "alpha", "zeta"]
    for part in (bundle.train, bundle.heldout):
        for row in (part[i] for i in range(len(part))):
            for number, place in enumerate(row.places):
                expected = bundle.chat["tasks"].index(rows[int(place.rpartition(":")[2]) - 1]["kind"])
                assert set(row.task_S[row.segment_S == number].tolist()) == {expected}
    assert 'tasks 0 "10", 1 "alpha", 2 "zeta"' in "\n".join(chat_data.told(bundle.chat, 64))


def test_adapters_that_route_by_task_need_as_many_as_the_data_has() -> None:
    banks = {"other": BankConfig("loramoe"), "mine": BankConfig("moelora-task", num_tasks=3)}
    recipe: Any = SimpleNamespace(adapter={name: expand(bank) for name, bank in banks.items()})
    assert task_problem(recipe, ["a", "b", "c"]) == ""
    assert "adapter.mine.num_tasks=3, and the data has 2 tasks (a, b); write num_tasks: 2" in task_problem(
        recipe, ["a", "b"]
    )
    assert "adapter.mine routes by task, and the data names none; write data.format" in task_problem(recipe, [])


def test_a_balance_by_task_needs_data_that_names_tasks() -> None:
    for coef, problem in ((0.0, ""), (0.1, "adapter.mine.balance=localized_cv2 evens out experts by task, ")):
        bank = expand(BankConfig("loramoe", router_aux_loss_coef=coef))
        recipe: Any = SimpleNamespace(adapter={"mine": bank})
        assert task_problem(recipe, ["a", "b", "c"]) == ""
        found = task_problem(recipe, [])
        assert found.startswith(problem)
        assert bool(found) == bool(problem)


def test_rows_of_data_that_names_no_tasks_have_none(tmp_path: Path) -> None:
    rows = [{**row, "kind": "ab"[i % 2]} for i, row in enumerate(rows_of(20))]
    assert load(tmp_path, rows).train[0].task_S is None
    assert load(tmp_path, rows, task_key="kind").train[0].task_S is not None


def test_the_cache_is_built_once_and_again_if_damaged(tmp_path: Path) -> None:
    first = load(tmp_path, rows_of(20))
    folder = tmp_path / "cache" / first.key
    for name in ("train.tokens", "train.learn", "heldout.samples", "train.order", "train.rows", "train.weights"):
        path = folder / name
        good, inode = path.read_bytes(), path.stat().st_ino
        assert load(tmp_path, rows_of(20)).key == first.key
        assert path.stat().st_ino == inode
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        load(tmp_path, rows_of(20))
        assert path.read_bytes() == good
    changed = [load(tmp_path, rows_of(20), **more).key for more in ({"packing": False}, {"task_key": "kind"})]
    assert len({first.key, load(tmp_path, rows_of(21)).key, *changed}) == 4


def test_too_few_rows_or_none_left_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1 row\(s\) found; at least two"):
        load(tmp_path, rows_of(1))
    with pytest.raises(
        DataError, match=r"the \w+ part has no sample left; dropped were .*'too long': .*chat\.jsonl:\d"
    ):
        load(tmp_path, rows_of(4), sequence_length=8, overlong="drop")


def test_the_label_tokens_of_a_step_are_those_its_workers_train_on(tmp_path: Path) -> None:
    bundle = load(tmp_path, rows_of(60))
    train = SimpleNamespace(global_batch_size=12, micro_batch_size=2, seed=3)
    recipe: Any = SimpleNamespace(train=train)
    for step in (1, 2, 9):
        seen = 0
        for micro in range(2):
            for rank in range(3):
                _, rows = training_rows(recipe, bundle.train, step, micro, rank, 3)
                seen += int((make_batch(rows, torch.device("cpu"), 1.0).inputs["labels"] != IGNORED).sum())
        assert labels_of_step(recipe, bundle.train, step) == seen


class _Model(torch.nn.Module):
    """The loss of every token is the number of the row's samples."""

    def forward(self, labels: Any, num_items_in_batch: float, segment_count: Any = None, **_: Any) -> Any:
        from moe.context import current

        segments = int(current().segment_T[current().mask_T].max()) + 1
        return SimpleNamespace(loss=torch.tensor(float((labels != IGNORED).sum() * segments)) / num_items_in_batch)


def test_heldout_loss_is_the_mean_over_answer_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = load(tmp_path, rows_of(60), heldout_fraction=0.5)
    monkeypatch.setattr(evaluation.dist, "all_reduce", lambda tensor: None)
    run: Any = SimpleNamespace(
        data=bundle,
        process=SimpleNamespace(rank=0, world=1, device=torch.device("cpu")),
        recipe=SimpleNamespace(train=SimpleNamespace(eval_sequences=9)),
        engine=SimpleNamespace(module=_Model()),
    )
    loss, tokens = evaluation.heldout_loss(run)
    rows = [bundle.heldout[i] for i in range(min(9, len(bundle.heldout)))]
    weights = [int((row.labels_S != IGNORED).sum()) for row in rows]
    assert len({len(row.places) for row in rows}) > 1
    assert tokens == sum(weights)
    assert loss == pytest.approx(np.average([len(row.places) for row in rows], weights=weights))
