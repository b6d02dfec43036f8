"""Tokenizers that a run makes or takes over, as Hugging Face folders.

Both kinds made here work on bytes, so every text has a spelling, and know one special token,
``<|endoftext|>``, which ends a document.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from trainer.documents import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END = "<|endoftext|>"
_BATCH = 64  # documents encoded at a time


def train_bpe(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Byte-level byte-pair encoding (Sennrich et al., arXiv 1508.07909, over bytes as in GPT-2).

    The same texts give the same vocabulary. It has ``vocab_size`` tokens, fewer if the text is too small.
    """
    tokenizer = _byte_level(models.BPE())
    tokenizer.train_from_iterator(
        texts,
        trainer=trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return tokenizer


def byte_tokenizer() -> tokenizers.Tokenizer:
    """257 tokens: token b is byte b, token 256 is ``<|endoftext|>``."""
    tokenizer = _byte_level(models.BPE(vocab=_byte_characters(), merges=[]))
    tokenizer.add_special_tokens([END])
    return tokenizer


def _byte_level(model: models.Model) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_characters() -> dict[str, int]:
    """The character that stands for each byte inside byte-level tokens: itself where it can be seen."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


def save_tokenizer(tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
    """Write a folder that ``AutoTokenizer.from_pretrained`` loads."""
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def model_tokenizer(folder: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder. Raises DataError if there is none or it cannot end a document."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"model.path: {folder} has no usable tokenizer ({error}); save one there") from error
    # Where there are no files, transformers makes one up for the model's type that knows special tokens only.
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise DataError(f"model.path: {folder} holds no tokenizer; save one there")
    if tokenizer.eos_token_id is None:
        raise DataError(f"model.path: the tokenizer in {folder} has no eos_token, which ends a document; set one")
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Iterator[list[int]]:
    """Token ids of each text. Special tokens spelt out in a text stay ordinary text."""
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == _BATCH:
            yield from _encoded(tokenizer, batch)
            batch = []
    if batch:
        yield from _encoded(tokenizer, batch)


def _encoded(tokenizer: PreTrainedTokenizerBase, batch: list[str]) -> list[list[int]]:
    encoded = tokenizer(
        batch,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return list(encoded["input_ids"])
