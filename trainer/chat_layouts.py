"""Rows of chat and instruction files, in any of four layouts, as one kind of value.

``messages``: a list of ``{role, content}`` (OpenAI); ``sharegpt``: ``conversations``, a list of ``{from, value}``;
``alpaca``: ``instruction``, ``input``, ``output``; ``prompt``: ``prompt`` and ``completion``. All files of a recipe
have one layout: it is told from each row's own keys, and a row of another one is an error.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from trainer.documents import DataError, json_rows, matching_texts
from trainer.schema import DataSection

ROLES = ("system", "user", "assistant", "tool")
_SPEAKERS = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
# Keys by which a layout is told, and all that are read of it.
_TELLING = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt": ("prompt", "completion"),
}
_READ = {
    "messages": {"messages", "conversations", "tools"},
    "sharegpt": {"conversations", "system", "tools"},
    "alpaca": {"instruction", "input", "output", "system", "history"},
    "prompt": {"prompt", "completion", "system"},
}

_EXTRA = ("name", "tool_call_id", "reasoning_content")  # of a message, beside role and content


@dataclass(frozen=True)
class Message:
    """One turn. ``learn``: whether its loss counts, if it is an answer (OpenAI's ``weight``)."""

    role: str
    content: str
    calls: tuple[dict[str, Any], ...] = ()
    extra: tuple[tuple[str, str], ...] = ()  # fields of _EXTRA, for the template
    learn: bool = True

    @property
    def is_empty(self) -> bool:
        return not self.content.strip() and not self.calls

    def for_template(self) -> dict[str, Any]:
        calls = {"tool_calls": list(self.calls)} if self.calls else {}
        return {"role": self.role, "content": self.content, **calls, **dict(self.extra)}


@dataclass(frozen=True)
class Conversation:
    """One row.

    Attributes:
        place: ``FILE:LINE``, for people.
        name: the same on every machine.
        raw: the row as it stands in the file.
        cut_turns: messages behind the last answer, which nothing would be learnt from; not in ``messages``.
        unread: keys of the row that nothing here reads.
    """

    place: str
    name: str
    raw: str
    layout: str
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    task: str | None = None
    cut_turns: int = 0
    unread: tuple[str, ...] = ()


def read_conversations(data: DataSection) -> Iterator[Conversation]:
    """Every row of the files, in order. Raises DataError with the row's place."""
    first: Conversation | None = None
    for name, path, text in matching_texts(data):
        for number, raw, row in json_rows(path, text):
            place = f"{path}:{number}"
            if not isinstance(row, dict):
                raise DataError(f"{place}: not an object; write one {{...}} a line")
            layout = _layout(row, place)
            if first is not None and layout != first.layout:
                raise DataError(
                    f"{place}: this row is of layout {layout}, and {first.place} of layout {first.layout}; convert one "
                    "of them, so that all rows have one layout"
                )
            task = None if data.task_key is None else _task(row, data.task_key, place)
            turns, tools = _READERS[layout](row, place)
            kept = _without_tail(turns)
            unread = tuple(sorted(row.keys() - _READ[layout] - {data.task_key}))
            conversation = Conversation(
                place, f"{name}#{number:09d}", raw, layout, kept, tools, task, len(turns) - len(kept), unread
            )
            first = first or conversation
            yield conversation


def _layout(row: dict[str, Any], place: str) -> str:
    found = [layout for layout, keys in _TELLING.items() if all(key in row for key in keys)]
    if len(found) > 1:
        raise DataError(f"{place}: has the keys of the layouts {' and '.join(found)}; remove those of one of them")
    if not found:
        keys = ", ".join(map(repr, row)) or "no keys"
        raise DataError(
            f"{place}: none of the layouts fits a row with {keys}; write 'messages', 'conversations', 'instruction' "
            "and 'output', or 'prompt' and 'completion' (docs/recipes.md, data)"
        )
    turns = row.get("conversations")
    if (
        found == ["sharegpt"]
        and isinstance(turns, list)
        and turns
        and isinstance(turns[0], dict)
        and "role" in turns[0]
    ):
        return "messages"  # under the other layout's name
    return found[0]


def _task(row: dict[str, Any], key: str, place: str) -> str:
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        what = f"holds {json.dumps(value)[:60]}" if key in row else "is not there"
        raise DataError(f"{place}: data.task_key {key!r} {what}; give every row's task as text or a whole number")
    return str(value)


def _without_tail(turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """Without what follows the last answer; all of it if there is no answer."""
    last = max((i for i, turn in enumerate(turns) if turn.role == "assistant"), default=len(turns) - 1)
    return turns[: last + 1]


# -- layouts -----------------------------------------------------------------------------------------------------------

Turns = tuple[tuple[Message, ...], tuple[dict[str, Any], ...]]


def _messages(row: dict[str, Any], place: str) -> Turns:
    key = "messages" if "messages" in row else "conversations"
    return _turns(row[key], key, place), _tools(row.get("tools"), place)


def _turns(entries: Any, key: str, place: str) -> tuple[Message, ...]:
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{place}: {key!r} is no list of messages, or an empty one; write [{{role, content}}, ...]")
    return tuple(_message(entry, f"{key}[{i}]", place) for i, entry in enumerate(entries))


def _message(entry: Any, where: str, place: str) -> Message:
    if not isinstance(entry, dict) or "role" not in entry:
        raise DataError(f"{place}: {where} has no 'role'; write {{role, content}}")
    role = _role(entry["role"], where, place)
    calls = entry.get("tool_calls") or ()
    if not isinstance(calls, list | tuple) or not all(isinstance(call, dict) for call in calls):
        raise DataError(f"{place}: {where}.tool_calls is no list of objects; mend or remove it")
    if calls and role != "assistant":
        raise DataError(f"{place}: {where} is of role {role} and has tool_calls; only an assistant calls tools")
    content = entry.get("content")
    if content is None and role == "assistant" and (calls or "content" in entry):
        content = ""  # OpenAI's own way to write an answer that only calls tools
    extra = tuple((name, str(entry[name])) for name in _EXTRA if entry.get(name) is not None)
    unknown = entry.keys() - {"role", "content", "tool_calls", "weight", *_EXTRA}
    if lost := sorted(name for name in unknown if entry[name] not in (None, "", [], {}, False)):
        raise DataError(
            f"{place}: {where} has {', '.join(map(repr, lost))}, which would be lost; move it to 'content' or drop it"
        )
    return Message(
        role, _text(content, f"{where}.content", place), tuple(map(_call, calls)), extra, _learn(entry, where, place)
    )


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """With its arguments as an object, as templates want them; OpenAI writes them as JSON text."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
    except ValueError:
        return call


def _learn(entry: dict[str, Any], where: str, place: str) -> bool:
    weight = entry.get("weight", 1)
    if isinstance(weight, str | list | dict) or weight not in (0, 1):
        raise DataError(f"{place}: {where}.weight is {json.dumps(weight)[:40]}; write 0 (no loss) or 1")
    return bool(weight)


def _role(said: Any, where: str, place: str) -> str:
    role = _SPEAKERS.get(said.lower()) if isinstance(said, str) else None
    if role is None:
        raise DataError(
            f"{place}: {where} is of the unknown role {json.dumps(said)[:40]}; write {', '.join(ROLES)} (or human, gpt)"
        )
    return role


def _text(content: Any, where: str, place: str) -> str:
    if isinstance(content, list):
        for part in content:
            if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                kind = part.get("type") if isinstance(part, dict) else part
                raise DataError(
                    f"{place}: {where} has a part of type {json.dumps(kind)[:40]}; only text is trained on; remove it"
                )
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise DataError(f"{place}: {where} is {json.dumps(content)[:40]}, not text; write text")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: {where} holds half a surrogate pair at {error.start}; mend the text") from None
    return content


def _tools(value: Any, place: str) -> tuple[dict[str, Any], ...]:
    """A list of schemas, or JSON text of one, as ShareGPT files have it."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise DataError(f"{place}: 'tools' is not JSON ({error}); write a list of tools") from None
    if value in (None, "", []) or (isinstance(value, str) and not value.strip()):
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError(f"{place}: 'tools' is no list of objects; write [{{type: function, function: ...}}]")
    return tuple(value)


def _sharegpt(row: dict[str, Any], place: str) -> Turns:
    entries = row["conversations"]
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{place}: 'conversations' is no list, or an empty one; write [{{from, value}}, ...]")
    turns = [*_system(row, place)]
    for i, entry in enumerate(entries):
        where = f"conversations[{i}]"
        if not isinstance(entry, dict) or "from" not in entry or "value" not in entry:
            raise DataError(f"{place}: {where} lacks 'from' or 'value'; write {{from, value}}")
        role, said = _role(entry["from"], where, place), _text(entry["value"], f"{where}.value", place)
        turns.append(Message(role, said, learn=_learn(entry, where, place)))
    return tuple(turns), _tools(row.get("tools"), place)


def _system(row: dict[str, Any], place: str) -> list[Message]:
    said = row.get("system")
    return [] if said in (None, "") else [Message("system", _text(said, "'system'", place))]


def _alpaca(row: dict[str, Any], place: str) -> Turns:
    """The input follows the instruction after an empty line. ``history`` is a list of earlier [question, answer]."""
    turns = _system(row, place)
    for i, pair in enumerate(row.get("history") or ()):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError(f"{place}: history[{i}] is no pair; write [question, answer]")
        for role, said in zip(("user", "assistant"), pair, strict=True):
            turns.append(Message(role, _text(said, f"history[{i}]", place)))
    asked = _text(row["instruction"], "'instruction'", place)
    given = _text(row.get("input") or "", "'input'", place)
    turns.append(Message("user", "\n\n".join(part for part in (asked, given) if part)))
    turns.append(Message("assistant", _text(row["output"], "'output'", place)))
    return tuple(turns), ()


def _prompt(row: dict[str, Any], place: str) -> Turns:
    """Texts, or lists of messages."""
    turns = _system(row, place)
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        if isinstance(row[key], list):
            turns += _turns(row[key], key, place)
        else:
            turns.append(Message(role, _text(row[key], repr(key), place)))
    return tuple(turns), ()


_READERS: dict[str, Callable[[dict[str, Any], str], Turns]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt": _prompt,
}
