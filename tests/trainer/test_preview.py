"""`planaria preview` shows what the model will see, and what of it has loss."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trainer import cli, preview

ROOT = Path(__file__).resolve().parents[2]
CHAT = str(ROOT / "tests" / "drills" / "chat.yaml")


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    rows = [{"instruction": f"say {i}", "output": f"é🪱{i}" * (1 + 30 * (i == 3)), "task": "t"} for i in range(12)]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return [f"data.include=[{tmp_path}/x.jsonl]", f"log.dir={tmp_path}"]


def test_samples_are_shown_with_their_answers_in_brackets(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert preview.main(CHAT, arguments, 100) == 0
    text = capsys.readouterr().out
    assert "chat rows of layout alpaca, template plain, all answers" in text
    assert "truncated 1 (" in text
    shown = [i for i in range(12) if f"User:\nsay {i}\nAssistant:\n[[é🪱{i}" in text]
    assert len(shown) == 10, "all but what is held out"
    assert {f"[[é🪱{i}<|endoftext|>]]" in text for i in shown if i != 3} == {True}
    assert "x.jsonl:1, 32 tokens, 8 with loss, task t\n" in text
    assert "x.jsonl:4, 96 tokens, " in text
    assert ", cut: " in text
    assert "--- sample 2 of 2: " in text
    assert "of padding; loss on" in text


def test_it_stops_at_the_wanted_number_and_marks_with_colours_on_a_terminal(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    preview.main(CHAT, arguments, 1)
    text = capsys.readouterr().out
    assert text.count("=== sequence") == 1
    assert "\033[32mé🪱" in text
    assert "[[" not in text


def test_text_is_shown_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert preview.main(str(ROOT / "tests" / "drills" / "drill.yaml"), [f"log.dir={tmp_path}"], 1) == 0
    text = capsys.readouterr().out
    assert "sequences of 32 tokens, all of them with loss" in text
    assert text.count("=== sequence") == 1


TENANTS = """\
model: {path: base}
data: {source: stdlib, include: ["json/*.py"], tokenizer: {kind: model}, sequence_length: 32}
train: {steps: 20, global_batch_size: 2, micro_batch_size: 1, lr: 1e-3}
adapter: {experts: {preset: expert-lora, r: 4}}
tenants:
  one: {seed: 1}
  two: {seed: 2, data: {source: files, include: ["x*.txt"]}}
"""


def test_each_tenants_own_text_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text(TENANTS)
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytewise = Tokenizer(models.BPE(letters, []))
    bytewise.pre_tokenizer, bytewise.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<|endoftext|>")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text('{"vocab_size": 257}')
    for name in ("x1.txt", "x2.txt"):
        (tmp_path / name).write_text(f"the second's own {name} " * 200)
    assert preview.main(str(tmp_path / "r.yaml"), [f"log.dir={tmp_path}", f"model.path={tmp_path}/base"], 2) == 0
    _, one, two = capsys.readouterr().out.split("##### tenant ")
    assert (one.count("=== sequence"), two.count("=== sequence")) == (2, 2)
    assert "the second's own" in two
    assert "the second's own" not in one


def test_a_mistake_in_a_row_is_said_without_a_traceback(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.jsonl").write_text('{"instruction": 1, "output": "a"}')
    assert cli.main(["preview", CHAT, *arguments, "--samples", "2"]) == 2
    assert "x.jsonl:1: data.task_key 'task' is not there; give" in capsys.readouterr().err
