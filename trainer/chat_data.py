"""Chat samples: encoded once, packed into rows of S tokens, and kept in files that are mapped into memory.

Files of each part (``train``, ``heldout``) in a cache folder, samples one after another (N samples, R rows):

``PART.tokens``  ids, uint16 or uint32
``PART.learn``   uint8, 1 where the token's loss counts
``PART.samples`` int64 [N,5]: first token, length, task, tokens cut off, place (file and line: ``meta.json`` has files)
``PART.order``   int64 [N]: samples in the order of the rows
``PART.rows``    int64 [R+1]: where each row's samples begin in ``order``
``PART.weights`` int64 [R]: tokens of each row whose loss counts

Shapes: S sequence_length, V vocabulary.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from trainer.chat_layouts import Conversation, read_conversations
from trainer.chat_packing import alone, pack
from trainer.chat_template import ChatEncoder, Encoded, template_of
from trainer.documents import DataError, Document, held_out
from trainer.schema import DataSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PARTS = ("train", "heldout")
IGNORED = -100  # transformers' label of a token without loss
_LINES = 1 << 32  # a place is file * _LINES + line
_SHOWN = 5  # places of dropped rows that are listed


@dataclass(frozen=True)
class ChatRow:
    """One row of S tokens. Padding is a sample of its own behind the others.

    Attributes:
        ids_S, labels_S: int64; a label is its own token (the model shifts them), or -100 without loss.
        segment_S: which of the row's samples a token belongs to, from 0.
        position_S: from 0 in each sample.
        task_S: the sample's task, 0 for padding; None if the data names no tasks.
        mask_S: false for padding.
        places: where the samples come from, ``FILE:LINE``, without the files' common folder.
        cut: how many tokens each sample has lost.
    """

    ids_S: np.ndarray
    labels_S: np.ndarray
    segment_S: np.ndarray
    position_S: np.ndarray
    task_S: np.ndarray | None
    mask_S: np.ndarray
    places: tuple[str, ...]
    cut: tuple[int, ...]

    @property
    def lengths(self) -> list[int]:
        return [int((self.mask_S & (self.segment_S == i)).sum()) for i in range(len(self.places))]


class ChatDataset:
    """Rows of one part, read from its files."""

    def __init__(self, folder: Path, part: str, meta: dict[str, Any], sequence_length: int) -> None:
        def mapped(name: str, dtype: str) -> np.ndarray:
            return np.memmap(folder / f"{part}.{name}", np.dtype(dtype), "r")

        self.sequence_length, self.padding = sequence_length, int(meta["padding"])
        self.weights = mapped("weights", "int64")
        self._tokens, self._learn = mapped("tokens", meta["dtype"]), mapped("learn", "uint8")
        self._samples = mapped("samples", "int64").reshape(-1, 5)
        self._order, self._rows = mapped("order", "int64"), mapped("rows", "int64")
        self._files: list[str] = meta["files_read"]
        self._names_tasks = bool(meta["chat"]["tasks"])

    def __len__(self) -> int:
        return len(self._rows) - 1

    def __getitem__(self, index: int) -> ChatRow:
        """Raises IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        samples = self._samples[self._order[self._rows[index] : self._rows[index + 1]]]
        length, at = self.sequence_length, 0
        ids_S, labels_S = np.full(length, self.padding, np.int64), np.full(length, IGNORED, np.int64)
        segment_S, position_S = np.full(length, len(samples), np.int64), np.arange(length)
        task_S = np.zeros(length, np.int64)
        for number, (first, count, task, _, _) in enumerate(samples.tolist()):
            here, there = slice(at, at + count), slice(first, first + count)
            ids_S[here] = self._tokens[there]
            labels_S[here] = np.where(self._learn[there] == 1, ids_S[here], IGNORED)
            segment_S[here], position_S[here], task_S[here] = number, np.arange(count), task
            at += count
        position_S[at:] = np.arange(length - at)
        places = tuple(f"{self._files[p // _LINES]}:{p % _LINES}" for p in samples[:, 4].tolist())
        return ChatRow(
            ids_S,
            labels_S,
            segment_S,
            position_S,
            task_S if self._names_tasks else None,
            np.arange(length) < at,
            places,
            tuple(samples[:, 3].tolist()),
        )


# -- building ----------------------------------------------------------------------------------------------------------


def scan_rows(data: DataSection) -> list[Document]:
    """Read every row once, for names, sizes and digests. Raises DataError, also for fewer than two rows."""
    found = []
    for row in read_conversations(data):
        raw = row.raw.encode("utf-8", "surrogatepass")
        found.append(Document(row.name, len(raw), xxhash.xxh3_128_hexdigest(raw)))
    if len(found) < 2:
        raise DataError(
            f"data.include: {len(found)} row(s) found; at least two are needed, since whole rows are held out"
        )
    return found


def key_causes(data: DataSection, model_path: str | None) -> dict[str, Any]:
    """What, besides texts and tokenizer, decides the cache's contents."""
    own = data.chat_template == "model"
    folder = Path(model_path or ".")
    files = sorted(folder.glob("chat_template*")) if own else []
    if not own and data.chat_template != "plain":
        files = [Path(data.chat_template or "")]
    try:
        template = [xxhash.xxh3_128_hexdigest(path.read_bytes()) for path in files if path.is_file()]
    except OSError:
        template = []  # reading it as a template will say what is wrong
    return {
        "chat_version": 1,
        "template": [data.chat_template if own or data.chat_template == "plain" else "file", template],
        "answers": data.answers,
        "packing": data.packing,
        "overlong": data.overlong,
        "task_key": data.task_key,
    }


@dataclass
class _Part:
    """The samples of one part so far, and what became of its rows."""

    counts: Counter[str] = field(default_factory=Counter)
    dropped: list[str] = field(default_factory=list)
    samples: list[list[int]] = field(default_factory=list)
    weights: list[int] = field(default_factory=list)

    def drop(self, row: Conversation, why: str) -> None:
        self.counts[f"drop:{why}"] += 1
        if len(self.dropped) < _SHOWN:
            self.dropped.append(f"{row.place} ({why})")

    def figures(self, rows: Sequence[Sequence[int]], length: int) -> dict[str, Any]:
        names = ("rows_read", "tokens", "label_tokens", "truncated", "tokens_cut", "label_tokens_cut", "empty_answers",
                 "turns_cut", "unended_answers")  # fmt: skip
        dropped = {name[5:]: count for name, count in sorted(self.counts.items()) if name.startswith("drop:")}
        return {
            "samples": len(self.samples),
            "sequences": len(rows),
            "padding": len(rows) * length - self.counts["tokens"],
            **{name: self.counts[name] for name in names},
            "dropped": dropped,
            "dropped_places": self.dropped,
        }


def build(
    folder: Path, data: DataSection, documents: list[Document], tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Write the files. Returns what ``meta.json`` says of them, and how often each token has loss in each part, [V].

    Raises DataError.
    """
    template = template_of(data.chat_template or "model", tokenizer)
    encoder = ChatEncoder(tokenizer, template, only_last=data.answers == "last")
    dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
    names = held_out(documents, data.heldout_fraction, 0)
    tasks = _tasks(data)
    parts = {part: _Part() for part in PARTS}
    kept_out = {document.digest for document in documents if document.name in names}
    twice = sum(document.digest in kept_out and document.name not in names for document in documents)
    counts_V = {part: np.zeros(vocab_size, np.int64) for part in PARTS}
    files: dict[str, int] = {}
    layout, unread = "", set[str]()
    streams = {(part, name): (folder / f"{part}.{name}").open("wb") for part in PARTS for name in ("tokens", "learn")}
    try:
        for row in read_conversations(data):
            layout, part = row.layout, "heldout" if row.name in names else "train"
            unread |= set(row.unread)
            kept = _sample(row, encoder, data, parts[part])
            if kept is None:
                continue
            ids, learn = np.array(kept.ids, dtype), np.array(kept.learn, np.uint8)
            counts_V[part] += np.bincount(ids[learn == 1], minlength=vocab_size)
            name, _, line = row.name.rpartition("#")
            place = files.setdefault(name, len(files)) * _LINES + int(line)
            _keep(parts[part], len(ids), int(learn.sum()), tasks.get(row.task or "", 0), place)
            streams[part, "tokens"].write(ids.tobytes())
            streams[part, "learn"].write(learn.tobytes())
    finally:
        for stream in streams.values():
            stream.flush()
            os.fsync(stream.fileno())
            stream.close()
    figures = {part: _arrange(folder, part, parts[part], data) for part in PARTS}
    meta = {
        "vocab_size": vocab_size,
        "dtype": dtype.name,
        "files_read": list(files),
        "padding": tokenizer.eos_token_id,
        "chat": {
            "layout": layout,
            "template": data.chat_template,
            "answers": data.answers,
            "answers_by": encoder.method,
            "packing": data.packing,
            "unread_keys": sorted(unread),
            "also_held_out": twice,
            "tasks": list(tasks),
            **figures,
        },
    }
    return meta, counts_V


def _tasks(data: DataSection) -> dict[str, int]:
    """Numbers of the tasks in sorted order, over both parts."""
    if data.task_key is None:
        return {}
    return {task: i for i, task in enumerate(sorted({row.task or "" for row in read_conversations(data)}))}


def _sample(row: Conversation, encoder: ChatEncoder, data: DataSection, part: _Part) -> Encoded | None:
    """The row as it will be trained on, or None if it is dropped; either way it is counted."""
    part.counts["rows_read"] += 1
    part.counts["turns_cut"] += row.cut_turns
    if not any(message.role == "assistant" for message in row.messages):
        part.drop(row, "no answer")
        return None
    whole = encoder.encode(row)
    part.counts["empty_answers"] += whole.empty_answers
    part.counts["unended_answers"] += whole.unended
    kept = Encoded(whole.ids[: data.sequence_length], whole.learn[: data.sequence_length])
    lost = len(whole.ids) - len(kept.ids)
    why = ""
    if not any(whole.learn):
        why = "empty answer" if whole.empty_answers else "no answer to learn from"
    elif lost and data.overlong == "drop":
        why = "too long"
    elif not any(kept.learn):
        why = "answer behind the cut"
    if why:
        part.drop(row, why)
        return None
    if lost:
        part.counts["truncated"] += 1
        part.counts["tokens_cut"] += lost
        part.counts["label_tokens_cut"] += sum(whole.learn) - sum(kept.learn)
        part.counts["cut_here"] = lost
    return kept


def _keep(part: _Part, length: int, learnt: int, task: int, place: int) -> None:
    first = part.counts["tokens"]
    part.samples.append([first, length, task, part.counts.pop("cut_here", 0), place])
    part.weights.append(learnt)
    part.counts["tokens"] += length
    part.counts["label_tokens"] += learnt


def _arrange(folder: Path, part: str, found: _Part, data: DataSection) -> dict[str, Any]:
    """Put the samples into rows. Raises DataError if there are none."""
    lengths = [sample[1] for sample in found.samples]
    rows = pack(lengths, data.sequence_length) if data.packing else alone(lengths)
    figures = found.figures(rows, data.sequence_length)
    if not rows:
        raise DataError(
            f"data: the {part} part has no sample left; dropped were {figures['dropped']}, e.g. "
            f"{', '.join(found.dropped)}; include more rows, or raise data.sequence_length or data.heldout_fraction"
        )
    _write(folder / f"{part}.samples", found.samples)
    _write(folder / f"{part}.order", [sample for row in rows for sample in row])
    _write(folder / f"{part}.rows", np.cumsum([0, *map(len, rows)]))
    _write(folder / f"{part}.weights", [sum(found.weights[sample] for sample in row) for row in rows])
    return figures


def _write(path: Path, values: Any) -> None:
    with path.open("wb") as file:
        file.write(np.asarray(values, np.int64).tobytes())
        file.flush()
        os.fsync(file.fileno())


# -- telling -----------------------------------------------------------------------------------------------------------


def told(chat: dict[str, Any], length: int) -> Iterator[str]:
    """Lines for a person: what was found, and what became of it."""
    unread = f"; not read: {', '.join(map(repr, chat['unread_keys']))}" if chat["unread_keys"] else ""
    yield (
        f"data: chat rows of layout {chat['layout']}, template {chat['template']}, {chat['answers']} answers, found by "
        f"{chat['answers_by']}{unread}"
    )
    for part in PARTS:
        f = chat[part]
        share = f["label_tokens"] / f["tokens"]
        how = "packed" if chat["packing"] else "one sample each"
        yield (
            f"data: {part}: {f['rows_read']} rows, {f['samples']} samples in {f['sequences']} sequences of {length} "
            f"({how}, {f['padding'] / (f['sequences'] * length):.1%} padding); {f['tokens']:,} tokens, loss on "
            f"{f['label_tokens']:,} ({share:.1%})"
        )
        dropped = ", ".join(f"{count} {why}" for why, count in f["dropped"].items())
        yield (
            f"data: {part}: dropped {sum(f['dropped'].values())}{f' ({dropped})' if dropped else ''}, truncated "
            f"{f['truncated']} ({f['tokens_cut']} tokens cut, {f['label_tokens_cut']} of answers), empty answers "
            f"without loss {f['empty_answers']}, messages behind the last answer left out {f['turns_cut']}"
        )
        if f["dropped_places"]:
            yield f"data: {part}: dropped e.g. {', '.join(f['dropped_places'])}"
        if f["unended_answers"]:
            yield (
                f"data: {part}: after {f['unended_answers']} answers the template writes no special token, so the "
                "model will not learn to stop"
            )
    if chat["also_held_out"]:
        yield (
            f"data: {chat['also_held_out']} rows of the training part are also held out, word for word: held-out loss "
            "is better than on rows that are new"
        )
    if chat["tasks"]:
        yield "data: tasks " + ", ".join(f"{i} {json.dumps(task)}" for i, task in enumerate(chat["tasks"]))
