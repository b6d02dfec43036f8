"""Text as it grows, over byte-level and byte-fallback tokenizers, against decoding all tokens at once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from inference.text import AnswerText, Detokeniser, StopStrings

SAMPLES = "aé€😀 \n\u0301ž"


def byte_level(ids: list[int]) -> str:
    """One byte a token, as byte-level BPE decodes without merges."""
    return bytes(ids).decode("utf-8", errors="replace")


def byte_fallback():
    """As Llama's: words with a sentencepiece blank, and bytes for what no word is."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁the": 256, "▁gate": 257, "s": 258}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer).decode


def pushed(decode, ids) -> list[str]:
    stream = Detokeniser(decode)
    return [*[stream.push(token) for token in ids], stream.finish()]


@given(st.text(alphabet=SAMPLES, max_size=40))
def test_pieces_are_whole_and_together_the_text(text):
    pieces = pushed(byte_level, list(text.encode()))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[-1] == "", "complete text is not held back"


@settings(max_examples=50)
@given(st.lists(st.one_of(st.sampled_from(["▁the", "▁gate", "s"]), st.sampled_from(list("aé€😀"))), max_size=20))
def test_pieces_are_whole_with_byte_fallback(words):
    names = {"▁the": [256], "▁gate": [257], "s": [258]}
    ids = [token for word in words for token in names.get(word, list(word.encode()))]
    decode = byte_fallback()
    pieces = pushed(decode, ids)
    assert "".join(pieces) == decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=60)
@given(st.lists(st.integers(0, 255), max_size=200))
def test_broken_bytes_come_out_as_they_decode(ids):
    assert "".join(pushed(byte_level, ids)) == byte_level(ids)


def test_broken_bytes_do_not_hold_back_forever():
    stream = Detokeniser(byte_level)
    shown = "".join(stream.push(0x80) for _ in range(500))
    assert len(shown) > 480
    assert len(stream._ids) - stream._start <= 80, "what is decoded with each token stays short"
    assert shown + stream.push(ord("a")) == byte_level([0x80] * 500 + [ord("a")])


@given(
    st.text(alphabet="abc", max_size=40),
    st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
    st.integers(1, 7),
)
def test_stop_strings_cut_wherever_pieces_end(text, stops, size):
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    stream, shown, pushed = StopStrings(stops), "", 0
    while pushed < len(text) and not stream.met:
        shown += stream.push(text[pushed : pushed + size])
        pushed += size
    assert stream.met == bool(found)
    if found:
        end, begin = min(found)
        assert pushed - size < end, "as soon as it is complete"
        assert shown == text[:begin]
    else:
        assert shown + stream.finish() == text


def test_what_cannot_begin_a_stop_string_is_shown_at_once():
    stream = StopStrings(["\nUser:", "END"])
    assert stream.push("hello E") == "hello "
    assert stream.push("N") == ""
    assert stream.push("X\nUs") == "ENX"
    assert stream.push("e") == ""
    assert stream.push("r: what END") == ""
    assert stream.met


def test_a_stop_string_over_tokens_and_characters():
    answer = AnswerText(byte_level, ("€!",))
    shown = [answer.push(byte) for byte in "5 €!x".encode()[:-1]]
    assert "".join(shown) == "5 "
    assert answer.stopped
    assert answer.finish() == ""


def test_the_end_gives_out_what_was_held():
    answer = AnswerText(byte_level, ("€!",))
    assert "".join(answer.push(byte) for byte in "5 €".encode()) == "5 "
    assert answer.finish() == "€"
    broken = AnswerText(byte_level, ())
    assert broken.push(0xE2) == ""
    assert broken.finish() == "\ufffd"


@pytest.mark.parametrize("stops", [(), ("x",)])
def test_without_a_tokenizer_there_is_no_text(stops):
    answer = AnswerText(None, stops)
    assert answer.push(5) == answer.finish() == ""
