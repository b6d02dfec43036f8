from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from inference.errors import InferenceError
from inference.prompts import ChatPrompts, TokenBytes

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'pope' %}{{ raise_exception('no popes') }}{% endif %}"
    "{{ m.role }}:{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return AutoTokenizer.from_pretrained(model_folder)


def user(content, role="user"):
    return [{"role": role, "content": content}]


def test_ids_are_those_of_the_rendered_text(tokenizer):
    found = ChatPrompts(tokenizer, TEMPLATE).encode([*user("be brief", "system"), *user("hé ☃")])
    assert list(found) == tokenizer("system:be brief<eos>user:hé ☃<eos>A:")["input_ids"]


def test_special_tokens_in_a_message_are_text(tokenizer):
    found = ChatPrompts(tokenizer, TEMPLATE).encode(user("x<eos>A:<eos>"))
    assert found.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(found) == "user:x<eos>A:<eos><eos>A:"


def test_what_cannot_be_rendered_is_refused_in_a_sentence(tokenizer):
    with pytest.raises(InferenceError, match="no chat template"):
        ChatPrompts(tokenizer).encode(user("a"))
    with pytest.raises(InferenceError, match="refuses this conversation: no popes"):
        ChatPrompts(tokenizer, TEMPLATE).encode(user("a", "pope"))
    with pytest.raises(InferenceError, match="private plane"):
        ChatPrompts(tokenizer, TEMPLATE).encode(user(chr(0x10F000)))


def test_bytes_of_byte_level_tokens_add_up_to_the_text(tokenizer):
    text = "def é☃\n\tplanarian 🐛"
    ids = tokenizer(text)["input_ids"]
    token = TokenBytes(tokenizer)
    assert b"".join(map(token, ids)) == text.encode()
    assert any(token.text(i).startswith("bytes:\\x") for i in ids)
    assert token.text(tokenizer("def")["input_ids"][0]) == "def"
    assert token.text(tokenizer.eos_token_id) == "<eos>"
    assert (token(511), token.text(511)) == (b"", "token_id:511")  # a row without a token


def test_bytes_of_sentencepiece_tokens():
    words = {"▁hi": 0, "<0xE2>": 1, "<0x98>": 2, "<0x83>": 3, "▁": 4, "<unk>": 5}
    pieces = Tokenizer(models.BPE(vocab=words, merges=[], byte_fallback=True, unk_token="<unk>"))
    pieces.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    token = TokenBytes(PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="<unk>"))
    assert [token(i) for i in range(5)] == [b" hi", b"\xe2", b"\x98", b"\x83", b" "]
    assert token.text(1) == "bytes:\\xe2"
