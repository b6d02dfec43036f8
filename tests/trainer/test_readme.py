"""What the README tells people to type must exist."""

import re
from pathlib import Path

import pytest

from trainer.cli import _parse

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = "\n".join(re.findall(r"```\n(.*?)```", README, flags=re.DOTALL))
COMMANDS = re.findall(r"^planaria (.+?)(?:\s+#.*)?$", BLOCKS, flags=re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_is_understood(command):
    words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', command)]
    assert _parse(words).verb.split() == words[: len(_parse(words).verb.split())]


def test_the_readme_names_commands_make_targets_and_files_that_exist():
    assert len(COMMANDS) >= 5
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"make (\w+)", README)) <= targets
    named = re.findall(r"`((?:docs|trainer|moe|checkpointing|recipes)/[\w/.-]+\.\w+)`", README)
    assert len(named) >= 8
    assert [name for name in named if not (ROOT / name).exists()] == []
