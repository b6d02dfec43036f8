"""The recipe reference names every key of the schema."""

import dataclasses
import re
from pathlib import Path

from lora.config import BankConfig
from trainer import schema

DOC = (Path(__file__).resolve().parents[2] / "docs" / "recipes.md").read_text()


def test_every_recipe_key_is_documented():
    named = set(re.findall(r"`(?:\w+\.)?(\w+)`", DOC)) | set(re.findall(r"`\{(\w+): ", DOC))
    sections = [BankConfig, *(v for k, v in vars(schema).items() if k.endswith("Section"))]
    keys = {field.name for section in sections for field in dataclasses.fields(section)}
    assert len(keys) > 50
    assert keys - named - {"memory", "disk", "wal", "pec", "kind", "vocab_size"} == set()
    assert {"memory.every", "disk.every", "wal.rotation", "pec.k_snapshot"} <= set(re.findall(r"`([\w.]+)`", DOC))
