"""Rows of every layout become the same conversations, and a row that cannot be read is named with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.chat_layouts import Conversation, read_conversations
from trainer.documents import DataError
from trainer.schema import DataSection, TokenizerSection

ASKED, SAID = "What? é🪱\n", "That.\x00"


def section(path: Path, **more: Any) -> DataSection:
    return DataSection(
        source="files", include=(str(path),), tokenizer=TokenizerSection(kind="bytes", vocab_size=257),
        sequence_length=64, format="chat", **more,
    )  # fmt: skip


def read(folder: Path, *rows: Any, **more: Any) -> list[Conversation]:
    path = folder / "x.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return list(read_conversations(section(path, **more)))


def said(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in conversation.messages]


LAYOUTS = {
    "messages": {"messages": [{"role": "user", "content": ASKED}, {"role": "assistant", "content": SAID}]},
    "sharegpt": {"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": SAID}]},
    "alpaca": {"instruction": ASKED, "input": "", "output": SAID},
    "prompt": {"prompt": ASKED, "completion": SAID},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_told_and_read(tmp_path: Path, layout: str) -> None:
    # The first line begins with a byte order mark, and one is empty.
    rows = ["\ufeff" + json.dumps(LAYOUTS[layout]), "\r", {**LAYOUTS[layout], "source": "web"}]
    first, second = read(tmp_path, *rows)
    assert first.layout == layout
    assert said(first) == said(second) == [("user", ASKED), ("assistant", SAID)]
    assert (first.unread, second.unread) == ((), ("source",))
    assert (first.place, second.place) == (f"{tmp_path}/x.jsonl:1", f"{tmp_path}/x.jsonl:3")
    assert second.name == "x.jsonl#000000003"


def test_what_the_layouts_can_hold_besides(tmp_path: Path) -> None:
    (alpaca,) = read(
        tmp_path,
        {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Count.", "history": [["Hi", "Ho"]]},
    )
    assert said(alpaca) == [
        ("system", "Count."), ("user", "Hi"), ("assistant", "Ho"), ("user", "Add.\n\n1 2"), ("assistant", "3"),
    ]  # fmt: skip
    tool = {"type": "function", "function": {"name": "add"}}
    (sharegpt,) = read(
        tmp_path,
        {
            "system": "Count.",
            "tools": json.dumps([tool]),
            "conversations": [
                {"from": "human", "value": "1+1"},
                {"from": "function_call", "value": "add(1, 1)"},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "Two.", "weight": 1},
            ],
        },
    )
    assert [m.role for m in sharegpt.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert sharegpt.tools == (tool,)
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    (openai,) = read(
        tmp_path,
        {
            "messages": [
                {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief"}]},
                {"role": "user", "content": "1+1", "name": "ann"},
                {"role": "assistant", "content": None, "tool_calls": [call], "weight": 0, "refusal": None},
                {"role": "tool", "content": "2", "tool_call_id": "1"},
                {"role": "assistant", "content": "Two."},
                {"role": "user", "content": "Thanks"},
                {"role": "user", "content": "Bye"},
            ]
        },
    )
    assert openai.cut_turns == 2, "nothing is learnt from what follows the last answer"
    system, user, calling, tool_turn, answer = openai.messages
    assert (system.role, system.content) == ("system", "Be brief")
    assert user.extra == (("name", "ann"),)
    assert calling.calls[0]["function"]["arguments"] == {"a": 1}
    assert not calling.is_empty
    assert (calling.learn, answer.learn) == (False, True)
    assert tool_turn.for_template() == {"role": "tool", "content": "2", "tool_call_id": "1"}
    (under_another_name,) = read(tmp_path, {"conversations": LAYOUTS["messages"]["messages"]})
    assert under_another_name.layout == "messages"
    (both,) = read(tmp_path, {"prompt": [{"role": "user", "content": "a"}], "completion": "b"})
    assert said(both) == [("user", "a"), ("assistant", "b")]


def test_a_mixture_is_refused_with_both_places(tmp_path: Path) -> None:
    message = r"x\.jsonl:2: this row is of layout alpaca, and \S+x\.jsonl:1 of layout messages; convert"
    with pytest.raises(DataError, match=message):
        read(tmp_path, LAYOUTS["messages"], LAYOUTS["alpaca"])


def turn(**changes: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "a", **changes}]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{oops", "not JSON"),
        ("[" * 100000, "not JSON"),
        ([1], "not an object"),
        ({}, "none of the layouts fits a row with no keys"),
        ({"text": "a"}, "none of the layouts fits a row with 'text'"),
        ({"instruction": "a"}, "none of the layouts fits"),
        ({**LAYOUTS["messages"], **LAYOUTS["prompt"]}, "layouts messages and prompt; remove"),
        ({"messages": []}, "an empty one"),
        ({"messages": {"role": "user"}}, "no list of messages"),
        ({"messages": ["hi"]}, r"messages\[0\] has no 'role'"),
        (turn(role="alien"), 'unknown role "alien"; write system, user'),
        (turn(role=None), "unknown role null"),
        (turn(content=None), r"messages\[0\]\.content is null, not text"),
        (turn(content=3), r"messages\[0\]\.content is 3, not text"),
        (turn(content=[{"type": "image_url", "image_url": "x"}]), 'a part of type "image_url"; only text'),
        (turn(content="\ud800"), "half a surrogate pair"),
        (turn(tool_calls=[{}]), "only an assistant calls tools"),
        (turn(role="assistant", tool_calls="x"), r"tool_calls is no list of objects"),
        (turn(weight=2), r"weight is 2; write 0 \(no loss\) or 1"),
        (turn(audio={"id": 1}), "has 'audio', which would be lost"),
        ({**turn(), "tools": "{"}, "'tools' is not JSON"),
        ({**turn(), "tools": [1]}, "'tools' is no list of objects"),
        ({"conversations": []}, "an empty one"),
        ({"conversations": [{"from": "human"}]}, "lacks 'from' or 'value'"),
        ({"conversations": [{"from": "cat", "value": "x"}]}, 'unknown role "cat"'),
        ({**LAYOUTS["alpaca"], "history": [["a"]]}, r"history\[0\] is no pair"),
        ({**LAYOUTS["alpaca"], "output": None}, "'output' is null, not text"),
        ({**LAYOUTS["prompt"], "completion": 1}, "'completion' is 1, not text"),
    ],
)
def test_a_row_that_cannot_be_read_is_named_and_says_what_to_do(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"x\.jsonl:2: .*{message}") as error:
        read(tmp_path, "", row)
    assert ";" in str(error.value)


@pytest.mark.parametrize("value", [None, "", True, 1.5, ["a"]])
def test_a_row_without_its_task_is_named(tmp_path: Path, value: Any) -> None:
    rows = [{**LAYOUTS["prompt"], "kind": task} for task in ("b", 3)]
    assert [row.task for row in read(tmp_path, *rows, task_key="kind")] == ["b", "3"]
    with pytest.raises(DataError, match=r"x\.jsonl:2: data\.task_key 'kind' holds .*; give every row's task"):
        read(tmp_path, rows[0], {**rows[0], "kind": value}, task_key="kind")
    with pytest.raises(DataError, match=r"x\.jsonl:1: data\.task_key 'kind' is not there; give"):
        read(tmp_path, LAYOUTS["prompt"], task_key="kind")
