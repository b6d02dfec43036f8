"""From texts and messages to token ids, and from token ids to the bytes that they stand for."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inference.errors import InferenceError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_STAND_IN = 0x10F000  # and on: of the special tokens that are spelt out in a message
_PRIVATE = re.compile("[\U0010f000-\U0010ffff]")


def read_template(path: str | None) -> str | None:
    """The text of a Jinja file, if one is named. Raises OSError or InferenceError."""
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InferenceError(f"--chat-template {path}: not UTF-8; give a Jinja file") from error


def check_text(text: str) -> None:
    """Raises InferenceError for what was not UTF-8 where it was read, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InferenceError(
            f"the text is not UTF-8 from character {error.start} on; convert it, as with iconv"
        ) from error


class ChatPrompts:
    """Renders conversations with a chat template and tokenises them.

    Special tokens that are spelt out in a message stay ordinary text, as in training: stand-ins keep them out of the
    rendering, so that nobody can end his turn, or begin another's, by writing so.

    Args:
        tokenizer: of the model.
        template: Jinja; by default the tokenizer's own.

    Raises:
        InferenceError: from :meth:`encode`, if there is no template, or it refuses the conversation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> None:
        own: Any = tokenizer.chat_template
        if isinstance(own, dict):
            own = own.get("default")
        self.template: str | None = template or own or None
        self._tokenizer = tokenizer
        added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._special = sorted(added | set(tokenizer.all_special_tokens), key=lambda t: (-len(t), t))

    def encode(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        """Token ids of the conversation and the opening of the next answer."""
        from jinja2 import TemplateError

        if self.template is None:
            raise InferenceError(
                "this model has no chat template; ask for a plain completion, or start with --chat-template FILE"
            )
        shielded = [{key: self._shield(text) for key, text in message.items()} for message in messages]
        try:
            text = str(
                self._tokenizer.apply_chat_template(
                    shielded, chat_template=self.template, add_generation_prompt=True, tokenize=False
                )
            )
        except (TemplateError, ValueError, TypeError, KeyError, IndexError) as error:
            raise InferenceError(f"the model's chat template refuses this conversation: {error}") from error
        ids: list[int] = []
        for piece in re.split("([\U0010f000-\U0010ffff])", text):
            literal = bool(_PRIVATE.fullmatch(piece))
            written = self._special[ord(piece) - _STAND_IN] if literal else piece
            if written:
                ids += self._tokenizer(written, add_special_tokens=False, split_special_tokens=literal)["input_ids"]
        return tuple(ids)

    def check(self) -> None:
        """Raises InferenceError now for what :meth:`encode` would refuse of every conversation."""
        self.encode([{"role": "user", "content": "a"}])

    def _shield(self, text: str) -> str:
        check_text(text)
        if _PRIVATE.search(text):
            raise InferenceError("a message holds characters of Unicode's last private plane; remove them")
        for i, token in enumerate(self._special):
            text = text.replace(token, chr(_STAND_IN + i))
        return text


class TokenBytes:
    """The bytes that single tokens stand for, which may be parts of characters."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = {}
        self._special = set(tokenizer.all_special_ids)
        self._read = _reader(tokenizer)

    def __call__(self, token_id: int) -> bytes:
        if token_id not in self._known:
            token = self._tokenizer.convert_ids_to_tokens(token_id)
            self._known[token_id] = b"" if token is None else self._bytes(token_id, str(token))
        return self._known[token_id]

    def text(self, token_id: int) -> str:
        """As OpenAI writes it: the text, or ``bytes:\\xe2\\x80`` where the token is a part of a character.

        ``token_id:500`` for one that the tokenizer does not know, as models may have more rows than it has tokens.
        """
        raw = self(token_id)
        if not raw:
            return f"token_id:{token_id}"
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _bytes(self, token_id: int, token: str) -> bytes:
        return token.encode() if token_id in self._special else self._read(token)


def _reader(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], bytes]:
    """How this tokenizer's tokens spell bytes: as GPT-2's visible characters, or as SentencePiece's pieces."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and "ByteLevel" in repr(backend.decoder):
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        characters: dict[int, str] = bytes_to_unicode()  # type: ignore[no-untyped-call]
        table = {character: byte for byte, character in characters.items()}
        return lambda token: b"".join(bytes([table[c]]) if c in table else c.encode() for c in token)

    def piece(token: str) -> bytes:
        byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
        return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()

    return piece
