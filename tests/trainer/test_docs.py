"""The recipe reference names every key of the schema; the adapters' page has every preset as it is."""

import dataclasses
import re
from pathlib import Path

from lora.combinations import shown
from lora.config import BankConfig
from lora.methods import METHODS
from lora.presets import PRESETS
from trainer import schema

DOC_FOLDER = Path(__file__).resolve().parents[2] / "docs"
DOC = (DOC_FOLDER / "recipes.md").read_text()


def test_every_recipe_key_is_documented():
    named = set(re.findall(r"`(?:\w+\.)?(\w+)`", DOC)) | set(re.findall(r"`\{(\w+): ", DOC))
    sections = [BankConfig, *(v for k, v in vars(schema).items() if k.endswith("Section"))]
    keys = {field.name for section in sections for field in dataclasses.fields(section)}
    assert len(keys) > 50
    assert keys - named - {"memory", "disk", "wal", "pec", "kind", "vocab_size"} == set()
    assert {"memory.every", "disk.every", "wal.rotation", "pec.k_snapshot"} <= set(re.findall(r"`([\w.]+)`", DOC))


def test_every_preset_is_in_the_table_with_its_paper_and_defaults():
    page = DOC_FOLDER.joinpath("adapters.md").read_text()
    found = re.findall(r"^\| `([a-z-]+)` \| (\S+) \| (.+) \| (.+) \|$", page, re.MULTILINE)
    rows = {name: row for name, *row in found}
    assert list(rows) == list(PRESETS)
    for name, (paper, _, defaults) in rows.items():
        assert paper == "-" or f"arXiv {paper}" in METHODS[name].__doc__
        base = re.search(r"else as `([a-z-]+)`", defaults)
        own = {key: value for key, value in PRESETS[name].items() if not base or PRESETS[base[1]].get(key) != value}
        assert defaults.partition(";")[0] == (", ".join(f"{key} {shown(value)}" for key, value in own.items()) or "-")
