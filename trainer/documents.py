"""Which texts a recipe's ``data`` section names, and which of them are held out.

A document is a file (format text) or one line's text (jsonl). Documents are known by names that do not
depend on the machine: paths relative to the standard library or to the files' common folder.
"""

from __future__ import annotations

import glob
import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import xxhash

from trainer.schema import DataSection

# Not the library's own text, or text about testing it.
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_MAX_BYTES_PER_TOKEN = 8


class DataError(ValueError):
    """The text cannot be used; the message names the pattern, file or line, and what to do."""


@dataclass(frozen=True, order=True)
class Document:
    name: str  # unique, the same on every machine
    num_bytes: int  # of UTF-8
    digest: str  # of the text


def matching_files(data: DataSection) -> list[tuple[str, Path]]:
    """(name, path) of every non-empty file that the patterns match, sorted by name.

    Raises DataError for a pattern that matches nothing.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if data.source == "stdlib" else None
    paths: set[Path] = set()
    for pattern in data.include:
        found = {
            Path(match)
            for match in glob.glob(str(root / pattern) if root else pattern, recursive=True)
            if os.path.isfile(match) and os.path.getsize(match)
        }
        if root:
            found = {path for path in found if not _NOT_LIBRARY & set(path.relative_to(root).parts)}
        if not found:
            where = f"the standard library ({root})" if root else "the file system"
            raise DataError(f"data.include: pattern {pattern!r} matches no file in {where}; correct or remove it")
        paths |= found
    base = root or Path(os.path.commonpath([path.parent for path in paths]))
    return sorted((path.relative_to(base).as_posix(), path) for path in paths)


def read_documents(data: DataSection) -> Iterator[tuple[str, str]]:
    """(name, text) of every document, in order of the files' names and their lines.

    Raises DataError for text that is not UTF-8 (such files of the standard library are skipped) and for
    lines without the text.
    """
    for name, path, text in matching_texts(data):
        if data.format == "text":
            yield name, text
        else:
            yield from _json_lines(name, path, text, data.text_key or "text")


def matching_texts(data: DataSection) -> Iterator[tuple[str, Path, str]]:
    """(name, path, text) of every file, as :func:`read_documents` reads them. Raises DataError."""
    for name, path in matching_files(data):
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            if data.source == "stdlib":
                continue
            raise DataError(f"{path}: not UTF-8 at byte {error.start}; convert it or exclude it") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); check it or exclude it") from None
        yield name, path, text


def json_rows(path: Path, text: str) -> Iterator[tuple[int, str, Any]]:
    """(line number, line, value) of every line that is not empty. Raises DataError."""
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: not JSON ({error}); write one object a line") from None
        yield number, line, row


def _json_lines(name: str, path: Path, text: str, key: str) -> Iterator[tuple[str, str]]:
    for number, _, row in json_rows(path, text):
        value = row.get(key) if isinstance(row, dict) else None
        if not isinstance(value, str):
            known = f"; it has {', '.join(map(repr, row))}" if isinstance(row, dict) else ""
            raise DataError(f"{path}:{number}: no text under {key!r}{known}; set data.text_key or mend the line")
        if value:
            yield f"{name}#{number:09d}", value


def scan(data: DataSection) -> list[Document]:
    """Read everything once, for names, sizes and digests. Raises DataError, also for fewer than two documents."""
    documents = []
    for name, text in read_documents(data):
        raw = text.encode("utf-8", "surrogatepass")
        documents.append(Document(name, len(raw), xxhash.xxh3_128_hexdigest(raw)))
    if len(documents) < 2:
        raise DataError(
            f"data.include: {len(documents)} document(s) found; at least two are needed, since whole documents "
            "are held out"
        )
    return documents


def held_out(documents: Sequence[Document], fraction: float, sequence_length: int) -> frozenset[str]:
    """Names of the documents to hold out, chosen by a hash of the name alone.

    About ``fraction`` of the documents, at least one, and more until they surely fill one sequence; never all.
    """
    chosen: list[str] = []
    size = 0
    ranked = sorted(documents, key=lambda document: (_rank(document.name), document.name))
    for document in ranked[:-1]:
        if chosen and _rank(document.name) >= fraction and size >= sequence_length * _MAX_BYTES_PER_TOKEN:
            break
        chosen.append(document.name)
        size += document.num_bytes
    return frozenset(chosen)


def _rank(name: str) -> float:
    """Uniform over [0, 1)."""
    return xxhash.xxh3_64_intdigest(PurePath(name).as_posix().encode()) / 2**64
