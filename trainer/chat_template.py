"""A conversation as the model will see it: rendered by a chat template, tokenised, with the answers marked.

The answers are found in one of two ways. A template with ``{% generation %}`` marks them itself. For any other, the
conversation up to an answer, with the template's opening of an answer, must be a true prefix of the conversation with
that answer, and this of the whole; what lies between is the answer. Where it is not, nothing is guessed: it is refused.

Special tokens that are spelt out in a message stay ordinary text: they are kept out of the rendering by stand-ins,
single characters of Unicode's last private plane.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.chat_layouts import Conversation, Message
from trainer.documents import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN = """\
{%- for tool in tools or [] -%}
{{ 'Tool offered: ' + (tool | tojson) + '\\n' }}
{%- endfor -%}
{%- for message in messages -%}
{{ message['role'] | capitalize + ((' ' + message['name']) if message['name'] else '') + ':\\n' }}
{%- if message['reasoning_content'] -%}{{ message['reasoning_content'] + '\\n' }}{%- endif -%}
{{ message['content'] }}
{%- for call in message['tool_calls'] or [] -%}{{ '\\nCall: ' + (call | tojson) }}{%- endfor -%}
{{ (eos_token if message['role'] == 'assistant' else '') + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Assistant:\\n' }}{%- endif -%}
"""
# Templates that write today's date would make other tokens every day.
_DATE = "{%- macro strftime_now(format) -%}{{ '2024-07-26' if '-' in format else '26 Jul 2024' }}{%- endmacro -%}"
_OPEN, _CLOSE = chr(0x10FFFC), chr(0x10FFFD)  # around answers, in the rendering of a template that marks them
_STAND_IN = 0x10F000  # and on: of the special tokens
_PRIVATE = re.compile("[\U0010f000-\U0010ffff]")


@dataclass(frozen=True)
class Encoded:
    """Token ids, and for each whether its loss counts. ``unended``: answers whose end no special token marks."""

    ids: list[int]
    learn: list[bool]
    empty_answers: int = 0
    unended: int = 0


def template_of(choice: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The template that ``data.chat_template`` names: the tokenizer's own, the plain one, or a file's.

    Raises DataError if there is none.
    """
    if choice == "plain":
        if tokenizer.eos_token is None:
            raise DataError(
                "data.chat_template: plain ends answers with eos_token, which this tokenizer lacks; set one"
            )
        return PLAIN
    if choice == "model":
        own = tokenizer.chat_template
        if isinstance(own, dict):
            own = own.get("default")
        if not own:
            raise DataError(
                "data.chat_template: the tokenizer of model.path has no chat template; write data.chat_template: "
                "plain, or the path of a Jinja file"
            )
        return str(own)
    try:
        return Path(choice).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise DataError(f"data.chat_template: {choice}: {why}; write model, plain, or a Jinja file's path") from None


class ChatEncoder:
    """Renders and tokenises conversations by one template.

    ``only_last``: earlier answers have no loss, and the template may write them as it likes. Raises DataError if the
    tokenizer cannot tell where its tokens lie in the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, only_last: bool = False) -> None:
        if not tokenizer.is_fast:
            raise DataError(
                "data.tokenizer: this tokenizer cannot say where its tokens lie in a text (it is no fast one); save "
                "the model with a tokenizer.json"
            )
        self.tokenizer, self.only_last = tokenizer, only_last
        dated = "strftime_now" in template
        self._template = (_DATE if dated else "") + template
        self._marked = _marking(self._template)
        self.method = "its own generation marks" if self._marked else "prefixes"
        added = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
        self._special = sorted(added | set(tokenizer.all_special_tokens), key=lambda t: (-len(t), t))

    def encode(self, conversation: Conversation) -> Encoded:
        """Raises DataError, with the row's place, for a conversation that the template refuses or shortens."""
        messages = [self._shielded(m, conversation.place) for m in conversation.messages]
        text = self._render(messages, conversation)
        self._check_whole(text, messages, conversation)
        spans = self._marked_spans(text, messages, conversation) if self._marked else None
        if spans is None:
            spans = self._prefix_spans(text, messages, conversation)
        answers = [m for m in conversation.messages if m.role == "assistant"]
        learnt, unended = [], 0
        if self.only_last:
            spans, answers = spans[-1:], answers[-1:]
        for (start, end), answer in zip(spans, answers, strict=True):
            if answer.is_empty or not answer.learn:
                continue
            end, ended = self._end(text[start:end], start)
            unended += not ended
            learnt.append((start, end))
        ids, learn = self._tokens(text, learnt)
        return Encoded(ids, learn, sum(answer.is_empty for answer in answers), unended)

    # -- rendering ---------------------------------------------------------------------------------------------------

    def _shielded(self, message: Message, place: str) -> dict[str, Any]:
        entry = message.for_template()
        for name in ("content", "reasoning_content"):
            if name in entry:
                if _PRIVATE.search(entry[name]):
                    raise DataError(f"{place}: a message holds characters of Unicode's last private plane; remove them")
                for i, token in enumerate(self._special):
                    entry[name] = entry[name].replace(token, chr(_STAND_IN + i))
        return entry

    def _render(
        self, messages: Sequence[dict[str, Any]], row: Conversation, opening: bool = False, template: str = ""
    ) -> str:
        from jinja2 import TemplateError

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages),
                    tools=list(row.tools) or None,
                    chat_template=template or self._template,
                    add_generation_prompt=opening,
                    tokenize=False,
                )
            )
        except (TemplateError, ValueError, TypeError, KeyError, IndexError) as error:
            raise DataError(
                f"{row.place}: the chat template refuses this conversation ({error}); mend the row, or give another "
                "data.chat_template"
            ) from None

    def _check_whole(self, text: str, messages: Sequence[dict[str, Any]], row: Conversation) -> None:
        """A template that does not know a role, or thinks, leaves messages out without a word."""
        missing = [f"the offered tool {name}" for tool in row.tools if (name := _name(tool)) not in text]
        at, answers = 0, [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for i, message in enumerate(messages):
            if self.only_last and i in answers[:-1]:
                continue
            what = f"message {i + 1} ({message['role']})"
            said = message["content"].strip()
            # A system prompt may stand elsewhere: some templates write it into a user's turn.
            found = text.find(said, 0 if message["role"] == "system" else at)
            if found < 0:
                missing.append(what)
            elif message["role"] != "system":
                at = found + len(said)
            missing += [f"a tool call of {what}" for c in message.get("tool_calls", ()) if _name(c) not in text]
            if message.get("reasoning_content", "").strip() not in text:
                missing.append(f"the reasoning of {what}")
        if missing:
            earlier = any("(assistant)" in what for what in missing) and len(answers) > 1
            shortened = ", or if it shortens earlier answers on purpose, write data.answers: last" if earlier else ""
            raise DataError(
                f"{row.place}: the chat template leaves out {' and '.join(missing)}; remove it from the row, or give "
                f"a data.chat_template that writes it{shortened}"
            )

    def _marked_spans(
        self, text: str, messages: Sequence[dict[str, Any]], row: Conversation
    ) -> list[tuple[int, int]] | None:
        marked = self._render(messages, row, template=self._marked)
        spans, plain = [], ""
        for piece in re.split(f"(?={_OPEN})", marked):
            inside, close, after = piece.removeprefix(_OPEN).partition(_CLOSE)
            if close:
                spans.append((len(plain), len(plain) + len(inside)))
            plain += inside + after
        answers = sum(m["role"] == "assistant" for m in messages)
        if plain != text or len(spans) != answers:
            raise DataError(
                f"{row.place}: the chat template marks {len(spans)} answers with {{% generation %}} where the row has "
                f"{answers}; mark each assistant message once, or none"
            )
        return spans

    def _prefix_spans(self, text: str, messages: Sequence[dict[str, Any]], row: Conversation) -> list[tuple[int, int]]:
        spans = []
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for i in answers[-1:] if self.only_last else answers:
            if i == 0:
                raise DataError(
                    f"{row.place}: begins with an answer, and what the chat template writes before it cannot be told; "
                    "put a question before it, or give a data.chat_template with {% generation %} around the answers"
                )
            before = self._render(messages[:i], row, opening=True)
            until = text if i == len(messages) - 1 else self._render(messages[: i + 1], row)
            if not (until.startswith(before) and text.startswith(until)):
                raise DataError(
                    f"{row.place}: message {i + 1} cannot be told from what is around it: the chat template writes the "
                    "turns before an answer otherwise once there are more; write data.answers: last, or give a "
                    "data.chat_template with {% generation %} around the answers"
                )
            spans.append((len(before), len(until)))
        return spans

    def _end(self, answer: str, start: int) -> tuple[int, bool]:
        """Where the answer ends: with the special token behind it, if there is one, but not what follows that."""
        kept = answer.rstrip()
        ended = any(kept.endswith(token) for token in self._special)
        return start + len(kept if ended else answer), ended

    # -- tokens ------------------------------------------------------------------------------------------------------

    def _tokens(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        learn: list[bool] = []
        base = 0
        for piece in re.split("([\U0010f000-\U0010ffff])", text):
            literal = bool(_PRIVATE.fullmatch(piece))
            written = self._special[ord(piece) - _STAND_IN] if literal else piece
            encoded = self.tokenizer(
                written,
                add_special_tokens=False,
                split_special_tokens=literal,
                return_offsets_mapping=True,
                return_attention_mask=False,
                verbose=False,
            )
            ids += encoded["input_ids"]
            low_N, high_N = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2).T + base
            if literal:
                low_N, high_N = np.full_like(low_N, base), np.full_like(high_N, base + 1)
            learn_N = np.zeros(len(low_N), bool)
            for start, end in spans:
                learn_N |= (low_N < end) & (high_N > start)
            learn += learn_N.tolist()
            base += len(piece)
        if learn:
            learn[0] = False  # nothing stands before it that could predict it
        return ids, learn


def _name(tool: dict[str, Any]) -> str:
    function = tool.get("function")
    return str((function if isinstance(function, dict) else tool).get("name", ""))


def _marking(template: str) -> str:
    """The template with characters where ``{% generation %}`` stood, or nothing if it does not.

    Two tags take the place of one, so that the blanks around it are trimmed as before.
    """
    opened, count = re.subn(
        r"\{%([-+]?)\s*generation\s*([-+]?)%\}",
        rf"{{%\1 if true %}}{{{{ '{_OPEN}' }}}}{{% if true \2%}}",
        template,
    )
    closed = re.sub(
        r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}",
        rf"{{%\1 endif %}}{{{{ '{_CLOSE}' }}}}{{% endif \2%}}",
        opened,
    )
    return closed if count else ""
