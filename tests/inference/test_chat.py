from __future__ import annotations

import io
import os
import pty
import signal
import sys

import pytest
from transformers import AutoTokenizer

from inference.chat import _VISIBLE, Conversation, converse, terminal_reader
from inference.engine import LLM
from inference.prompts import ChatPrompts
from inference.requests import SamplingParams
from tests.forked import planaria

TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }}<eos>{% endfor %}A:"


@pytest.fixture(scope="module")
def llm(model_folder):
    return LLM(model_folder, device="cpu")


@pytest.fixture
def conversation(llm):
    prompts = ChatPrompts(AutoTokenizer.from_pretrained(llm.path), TEMPLATE)
    return Conversation(llm.engine, prompts, SamplingParams(), max_new_tokens=8, positions=256, system="be brief")


def run(conversation, *lines):
    """What the terminal shows. An exception among the lines is raised instead of reading one."""
    given = iter([*lines, EOFError()])

    def read():
        line = next(given)
        if isinstance(line, BaseException):
            raise line
        return line

    out = io.StringIO()
    converse(conversation, read, out)
    return out.getvalue()


def expected(llm, text, max_new_tokens=8):
    ids = AutoTokenizer.from_pretrained(llm.path)(text)["input_ids"]
    (generation,) = llm.generate([ids], max_new_tokens)
    return generation.text


def test_each_answer_continues_the_whole_conversation(conversation, llm):
    shown = run(conversation, "hello", "", "and then?")
    first = expected(llm, "system:be brief<eos>user:hello<eos>A:")
    assert [m["content"] for m in conversation.said] == ["hello", first, "and then?", conversation.said[3]["content"]]
    assert shown.startswith(first.translate(_VISIBLE))
    assert not set(shown) & set(map(chr, (*range(9), *range(11, 32), *range(127, 160))))
    # What the model said is text, whatever it spells, so its ids are those of the rendering of the whole.
    ids = conversation.prompts.encode(conversation.messages[:-1])
    (second,) = llm.generate([ids], 8)
    assert conversation.said[3]["content"] == second.text
    assert "[the most tokens an answer may have]" in shown


def test_reset_history_and_help(conversation):
    shown = run(conversation, "hello", "/history", "/reset", "/history", "/nonsense", "/quit", "never read")
    assert "user: hello" in shown
    assert "a new conversation" in shown
    assert shown.count("system: be brief") == 2
    assert "no command /nonsense; /reset forgets" in shown
    assert conversation.said == []


def test_interrupts_stop_the_answer_and_not_the_program(conversation, llm):
    conversation.max_new_tokens = 100
    step, steps = llm.engine.step, []

    def counted():
        steps.append(1)
        if len(steps) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return step()

    before = signal.getsignal(signal.SIGINT)
    conversation.engine = type(
        "Counted", (), {"step": staticmethod(counted), "__getattr__": lambda _, n: getattr(llm.engine, n)}
    )()
    shown = run(conversation, KeyboardInterrupt(), "hello", "/history")
    assert "(ctrl-D ends)" in shown
    assert " [stopped]" in shown
    assert len(steps) == 5
    assert not llm.engine.has_work()
    assert conversation.said[1]["role"] == "assistant"
    assert expected(llm, "system:be brief<eos>user:hello<eos>A:").startswith(conversation.said[1]["content"])
    assert signal.getsignal(signal.SIGINT) is before


def test_a_conversation_that_is_too_long_says_so_and_forgets_the_line(conversation):
    conversation.positions = 30
    shown = run(conversation, "word " * 40)
    assert "the model's context 30; /reset begins a new one" in shown
    assert conversation.said == []


def test_the_command_talks_in_a_terminal(model_folder, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    command = ["chat", model_folder, "--chat-template", template, "--max-new-tokens", "4", "--temperature", "0"]
    ours, theirs = pty.openpty()
    with (tmp_path / "out").open("wb") as out, (tmp_path / "errors").open("wb") as errors:
        process = planaria(*command, output=(out.fileno(), errors.fileno()), stdin=theirs)
    try:
        os.write(ours, b"hello\n/history\n/quit\n")
        status = process.wait(timeout=100)
    finally:
        process.kill()
        os.close(ours)
        os.close(theirs)
    assert status == 0, (tmp_path / "errors").read_text()
    shown = (tmp_path / "out").read_text()
    assert shown.startswith("/reset forgets the conversation")
    assert "user: hello" in shown
    assert "4 tokens in" in shown


def test_a_line_that_is_not_utf8_is_refused_and_the_conversation_goes_on(conversation, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hi \xff\xfe\nhello\n"), encoding="utf-8"))
    out = io.StringIO()
    converse(conversation, terminal_reader(), out)
    assert "the text is not UTF-8 from character 3 on" in out.getvalue()
    assert [message["content"] for message in conversation.said[::2]] == ["hello"]


def test_a_model_without_a_template_is_refused(model_folder, capsys):
    from trainer.cli import main

    assert main(["chat", str(model_folder)]) == 2
    assert "no chat template" in capsys.readouterr().err
