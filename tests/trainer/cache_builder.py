"""A process that loads a section of data when it is told to; for test_data.py."""

from __future__ import annotations

from multiprocessing.connection import Connection
from pathlib import Path

from trainer.data import load_section
from trainer.schema import DataSection, TokenizerSection

DATA = DataSection(
    source="stdlib",
    include=("json/*.py", "email/*.py"),
    sequence_length=16,
    tokenizer=TokenizerSection(kind="bpe", vocab_size=500),
)


def load_when_told(pipe: Connection, cache: Path) -> None:
    """Sends ``ready``, waits for a word, loads, and sends the key and the last sample."""
    pipe.send("ready")
    pipe.recv()
    bundle = load_section(DATA, cache_root=cache)
    pipe.send((bundle.key, bundle.train[len(bundle.train) - 1].tolist()))
