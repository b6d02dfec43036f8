"""The values of a recipe as the rules read them, before the recipe is known to be whole."""

from __future__ import annotations

from dataclasses import MISSING
from typing import Any

from trainer.schema import KEYS, schema_path
from trainer.yaml_lines import Path

Finding = tuple[str | Path, str]  # key that the user should look at (dotted, or a path), message


class Unknown(Exception):
    """A value that a rule needs is missing or already reported as wrong."""


class View:
    """Values of a recipe by dotted key, with the schema's defaults.

    A key that is missing or already wrong raises :class:`Unknown`, which skips only the rules that need it: one run
    reports everything it can.
    """

    def __init__(self, values: dict[str, Any], bad: set[Path]) -> None:
        self.values = values
        self.bad = bad

    def __call__(self, key: str) -> Any:
        path = tuple(key.split("."))
        if self.reported(key):
            raise Unknown
        node: Any = self.values
        for i, part in enumerate(path):
            if not isinstance(node, dict):
                raise Unknown
            if part not in node:
                default = KEYS[schema_path(path)].default
                if KEYS[schema_path(path[: i + 1])].default is MISSING or default is MISSING:
                    raise Unknown
                return default
            node = node[part]
        return node

    def reported(self, key: str) -> bool:
        """Whether a problem with the key, a section around it or something in it is already known."""
        path = tuple(key.split("."))
        return any(wrong[: len(path)] == path or path[: len(wrong)] == wrong for wrong in self.bad)

    def given(self, key: str) -> bool:
        node: Any = self.values
        for part in key.split("."):
            if not isinstance(node, dict) or part not in node:
                return False
            node = node[part]
        return True
