"""Text to training samples: tokenised once, packed, addressed by a global cursor.

``load`` builds a cache folder under a name that is a hash of its contents' causes (texts, tokenizer,
sequence length, held-out part), in a temporary folder that is renamed when it is whole.

Sample ``g`` of the run (counted from 0 over all workers and epochs) is a function of (seed, g) alone, so a
resume needs no replay and the order does not depend on the number of workers.

Shapes: S sequence_length, V vocabulary.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from trainer import chat_data
from trainer.cache import PARTS, digests_of, file_digest, open_or_build, write_meta
from trainer.chat_data import ChatDataset
from trainer.chat_template import template_of
from trainer.data_rules import task_problem
from trainer.documents import DataError, Document, held_out, read_documents, scan
from trainer.schema import DataSection, Recipe

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "DataBundle",
    "DataError",
    "PackedDataset",
    "batch_ids",
    "cache_root",
    "load",
    "load_section",
    "sample_order",
]

_VERSION = 1  # part of every cache's key: raise it when the same causes give other tokens


class PackedDataset:
    """Samples of S tokens cut one after another from a token file; the labels are the same ids, shifted by
    the model."""

    def __init__(self, tokens: np.ndarray, sequence_length: int) -> None:
        self.tokens = tokens
        self.sequence_length = sequence_length

    def __len__(self) -> int:
        return len(self.tokens) // self.sequence_length

    def __getitem__(self, index: int) -> np.ndarray:
        """int64 [S]. Raises IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        start = index * self.sequence_length
        return self.tokens[start : start + self.sequence_length].astype(np.int64)


@dataclass(frozen=True)
class DataBundle:
    """What a run reads.

    Attributes:
        tokenizer_dir: a Hugging Face tokenizer folder.
        vocab_size: rows the model's embedding needs.
        unigram_entropy_nats: loss, in nats per token, on the held-out part of the best model that ignores
            context: token frequencies of the training part, one added to each count.
        key: names the cache; changes with the texts and the settings.
        chat: format chat: what was found and what became of it (:func:`trainer.chat_data.build`); else empty.
    """

    train: PackedDataset | ChatDataset
    heldout: PackedDataset | ChatDataset
    tokenizer_dir: Path
    vocab_size: int
    unigram_entropy_nats: float
    key: str
    train_documents: int
    heldout_documents: int
    chat: dict[str, Any] = field(default_factory=dict)


def cache_root(recipe: Recipe) -> Path:
    """The folder that holds the caches: ``data.cache_dir``, or ``cache`` in ``log.dir``."""
    return Path(recipe.data.cache_dir) if recipe.data.cache_dir else Path(recipe.log.dir) / "cache"


def load(recipe: Recipe, rank: int = 0) -> DataBundle:
    """What the recipe reads; rank 0 prints lines about it. Raises DataError, also if its adapters need other tasks."""
    bundle = load_section(recipe.data, cache_root=cache_root(recipe), model_path=recipe.model.path)
    if problem := task_problem(recipe, bundle.chat.get("tasks", [])):
        raise DataError(problem)
    if rank == 0 and bundle.chat:
        print("\n".join(chat_data.told(bundle.chat, recipe.data.sequence_length)), flush=True)
    elif rank == 0:
        print(
            f"data: {bundle.train_documents} documents train, {bundle.heldout_documents} held out; "
            f"{len(bundle.train)} and {len(bundle.heldout)} sequences of {recipe.data.sequence_length} tokens "
            f"from a vocabulary of {bundle.vocab_size}",
            flush=True,
        )
    return bundle


def load_section(data: DataSection, *, cache_root: Path, model_path: str | None = None) -> DataBundle:
    """Open the cache of ``data``, building it first if it is not there or not whole.

    Any number of processes may call this at once: one builds, the others wait for it. Raises DataError.
    """
    documents = chat_data.scan_rows(data) if data.format == "chat" else scan(data)

    def build(folder: Path) -> None:
        (_build_chat if data.format == "chat" else _build)(folder, data, documents, model_path)

    key = _key(data, documents, model_path)
    return _open(open_or_build(Path(cache_root), key, build), data.sequence_length)


def _key(data: DataSection, documents: list[Document], model_path: str | None) -> str:
    causes: dict[str, Any] = {
        "version": _VERSION,
        "documents": [(document.name, document.digest) for document in documents],
        "tokenizer": [data.tokenizer.kind, data.tokenizer.vocab_size],
        "sequence_length": data.sequence_length,
        "heldout_fraction": data.heldout_fraction,
    }
    if data.tokenizer.kind == "model":
        causes["model"] = {
            path.name: xxhash.xxh3_128_hexdigest(path.read_bytes())
            for path in sorted(Path(model_path or ".").glob("*"))
            if "token" in path.name or path.name in ("vocab.json", "merges.txt", "spiece.model")
        }
    if data.format == "chat":
        causes |= chat_data.key_causes(data, model_path)
    return xxhash.xxh3_128_hexdigest(json.dumps(causes, sort_keys=True).encode())


def _build(folder: Path, data: DataSection, documents: list[Document], model_path: str | None) -> None:
    from trainer import tokenizer as tokens

    table = _table(data, folder / "arrow")
    names = held_out(documents, data.heldout_fraction, data.sequence_length)
    rows: dict[str, list[int]] = {part: [] for part in PARTS}
    for i, name in enumerate(table["name"]):
        rows["heldout" if name in names else "train"].append(i)

    if data.tokenizer.kind == "bpe":
        trained = tokens.train_bpe(_texts(table, rows["train"]), data.tokenizer.vocab_size)
        tokens.save_tokenizer(trained, folder / "tokenizer")
    tokenizer, vocab_size = _tokenizer(folder / "tokenizer", data, model_path)
    dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
    meta: dict[str, Any] = {"vocab_size": vocab_size, "dtype": dtype.name}
    counts = {}
    for part in PARTS:
        path = folder / f"{part}.bin"
        ids = tokens.encode(tokenizer, _texts(table, rows[part]))
        counts[part] = _write_tokens(path, ids, tokenizer.eos_token_id, vocab_size, dtype)
        total = int(counts[part].sum())
        meta[part] = {"documents": len(rows[part]), "tokens": total, "digest": file_digest(path)}
        if total < data.sequence_length:
            raise DataError(
                f"data: the {part} part has {total} tokens, less than one sequence of {data.sequence_length}; "
                "include more text or lower data.sequence_length"
            )
    meta["unigram_entropy_nats"] = _unigram_entropy(counts["train"], counts["heldout"])
    del table
    shutil.rmtree(folder / "arrow")
    write_meta(folder, meta)


def _tokenizer(folder: Path, data: DataSection, model_path: str | None) -> tuple[PreTrainedTokenizerBase, int]:
    """The recipe's tokenizer, written to ``folder`` unless it was trained there, and the rows an embedding needs."""
    from transformers import AutoTokenizer

    from trainer import tokenizer as tokens

    if data.tokenizer.kind == "model":
        tokens.model_tokenizer(model_path or "").save_pretrained(folder)
    elif data.tokenizer.kind == "bytes":
        tokens.save_tokenizer(tokens.byte_tokenizer(), folder)
    # From the folder that was written, so that export and inference read the same tokens.
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    vocab_size = max(len(tokenizer), data.tokenizer.vocab_size)
    if data.tokenizer.kind == "model":
        _check_rows(Path(model_path or ""), vocab_size)
    return tokenizer, vocab_size


def _build_chat(folder: Path, data: DataSection, documents: list[Document], model_path: str | None) -> None:
    tokenizer, vocab_size = _tokenizer(folder / "tokenizer", data, model_path)
    meta, counts = chat_data.build(folder, data, documents, tokenizer, vocab_size)
    if data.chat_template != "model":
        # What is exported is to be asked in the way it was trained.
        tokenizer.chat_template = template_of(data.chat_template or "", tokenizer)
        tokenizer.save_pretrained(folder / "tokenizer")
    entropy = _unigram_entropy(counts["train"], counts["heldout"])
    write_meta(folder, {**meta, "unigram_entropy_nats": entropy, "files": digests_of(folder)})


def _check_rows(model: Path, num_tokens: int) -> None:
    try:
        rows = json.loads((model / "config.json").read_text())["vocab_size"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # another layout of the configuration; the model's builder will say if it is unreadable
    if num_tokens > rows:
        raise DataError(
            f"model.path: the tokenizer in {model} has {num_tokens} tokens, the model's embedding {rows} rows; "
            "take both from the same model"
        )


def _table(data: DataSection, folder: Path) -> datasets.Dataset:
    import datasets

    progress = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        return datasets.Dataset.from_generator(
            _rows,
            features=datasets.Features({"name": datasets.Value("string"), "text": datasets.Value("large_string")}),
            cache_dir=str(folder),
            gen_kwargs={"data": data},
        )
    finally:
        if progress:
            datasets.enable_progress_bars()


def _texts(table: datasets.Dataset, rows: list[int]) -> Iterator[str]:
    return (table[i]["text"] for i in rows)


def _write_tokens(path: Path, texts: Iterator[list[int]], end: int, vocab_size: int, dtype: np.dtype) -> np.ndarray:
    """Write each text's ids and ``end``; returns how often each token was written, int64 [V]."""
    counts_V = np.zeros(vocab_size, np.int64)
    with path.open("wb") as file:
        for ids in texts:
            array = np.array([*ids, end], dtype)
            counts_V += np.bincount(array, minlength=vocab_size)
            file.write(array.tobytes())
        file.flush()
        os.fsync(file.fileno())
    return counts_V


def _rows(data: DataSection) -> Iterator[dict[str, str]]:
    for name, text in read_documents(data):
        yield {"name": name, "text": text}


def _unigram_entropy(train_V: np.ndarray, heldout_V: np.ndarray) -> float:
    """Nats per held-out token under the training part's token frequencies, one added to each count."""
    log_p_V = np.log(train_V + 1.0) - math.log(train_V.sum() + len(train_V))
    return float(-(heldout_V * log_p_V).sum() / heldout_V.sum())


def _open(folder: Path, sequence_length: int) -> DataBundle:
    meta = json.loads((folder / "meta.json").read_text())
    chat = meta.get("chat", {})
    train: PackedDataset | ChatDataset
    heldout: PackedDataset | ChatDataset
    if chat:
        train, heldout = (ChatDataset(folder, part, meta, sequence_length) for part in PARTS)
        documents = [chat[part]["samples"] for part in PARTS]
    else:
        train, heldout = (
            PackedDataset(np.memmap(folder / f"{part}.bin", np.dtype(meta["dtype"]), "r"), sequence_length)
            for part in PARTS
        )
        documents = [meta[part]["documents"] for part in PARTS]
    return DataBundle(
        train=train,
        heldout=heldout,
        tokenizer_dir=folder / "tokenizer",
        vocab_size=meta["vocab_size"],
        unigram_entropy_nats=meta["unigram_entropy_nats"],
        key=folder.name,
        train_documents=documents[0],
        heldout_documents=documents[1],
        chat=chat,
    )


def sample_order(global_index: int, num_samples: int, seed: int) -> int:
    """Which dataset item sample ``global_index`` of the run is.

    Every epoch of ``num_samples`` is a permutation of its own, in constant memory: a Feistel network on
    the smallest even number of bits, re-applied until it lands in range (cycle walking: Black and Rogaway,
    "Ciphers with arbitrary finite domains", CT-RSA 2002).
    """
    assert global_index >= 0
    assert num_samples >= 1
    epoch, index = divmod(global_index, num_samples)
    half = max(1, ((num_samples - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    key = _mix(_mix(seed & _MASK64) + epoch)
    while True:
        left, right = index >> half, index & mask
        for turn in range(6):
            left, right = right, left ^ (_mix(key + (turn << 56) + right) & mask)
        index = left << half | right
        if index < num_samples:
            return index


_MASK64 = (1 << 64) - 1


def _mix(x: int) -> int:
    """A 64-bit finaliser: every input bit reaches every output bit (the constants are SplitMix64's)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def batch_ids(
    step: int, micro_step: int, dp_rank: int, dp_world: int, global_batch_size: int, micro_batch_size: int
) -> list[int]:
    """Global sample indices of one worker's micro-batch.

    Step s, counted from 1, consumes samples [(s-1)·B, s·B) whatever the number of workers.
    """
    per_micro_step = dp_world * micro_batch_size
    assert global_batch_size % per_micro_step == 0
    assert step >= 1
    assert 0 <= dp_rank < dp_world
    assert 0 <= micro_step < global_batch_size // per_micro_step
    first = (step - 1) * global_batch_size + micro_step * per_micro_step + dp_rank * micro_batch_size
    return list(range(first, first + micro_batch_size))
