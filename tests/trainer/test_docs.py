"""The recipe reference names every key of the schema; the adapters' page has every preset as it is."""

import dataclasses
import re
from pathlib import Path

import pytest

from lora.combinations import shown
from lora.methods import METHODS
from lora.presets import PRESETS
from trainer import schema

DOC_FOLDER = Path(__file__).resolve().parents[2] / "docs"
DOC = (DOC_FOLDER / "recipes.md").read_text()


AS_ONE = {"data.tokenizer", "tenants.data"}  # sections that have one row


def keys_of(section):
    """As a table writes them: what lies in a section of it with that section's name."""
    named = (section, "*") if (section,) in schema.NAMED else (section,)
    rest = {key.path[len(named) :] for key in schema.KEYS.values() if key.path[: len(named)] == named} - {()}
    whole = {path for path in rest if f"{section}.{path[0]}" in AS_ONE}
    inner = {path for path in rest - whole if any(other[: len(path)] == path and other != path for other in rest)}
    return sorted({".".join(path) for path in rest - whole - inner} | {path[0] for path in whole})


@pytest.mark.parametrize("section", [field.name for field in dataclasses.fields(schema.Recipe)])
def test_the_table_of_a_section_has_its_keys_and_no_others(section):
    table = DOC.split(f"\n## {section}\n")[1].split("| key |")[1].partition("\n\n")[0]
    cells = re.findall(r"^\| (`.+?) \|", table, re.MULTILINE)
    documented = [key for cell in cells for key in re.findall(r"`(.+?)`", cell)]
    assert sorted(documented) == keys_of(section)
    assert len(documented) >= 4


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
