"""YAML with line numbers: the values of a document and the place where each was written.

Scalars follow YAML 1.2, not PyYAML's YAML 1.1: ``2e-4`` is a number, ``yes`` is text, ``1:30`` is
text. Duplicate keys, tags and keys that are not names are problems, all reported together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import yaml

Path = tuple[str | int, ...]

_TAG = "tag:yaml.org,2002:"
_RESOLVERS = (
    ("null", re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")),
    ("int", re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"), list("-+0123456789")),
    (
        "float",
        re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
        list("-+.0123456789"),
    ),
)
# Beyond any recipe's depth, below the interpreter's recursion limit.
_MAX_DEPTH = 32
_FROM_ALIASES = 10_000  # values that aliases may add to those that are written out


class _TooMany(Exception):
    """Aliases of aliases: a short text can stand for more values than there is memory."""


@dataclass(frozen=True, order=True)
class Place:
    """Where a value comes from: ``recipe.yaml:12`` or ``argument 'train.lr=1'``; orders as read."""

    order: int
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, order=True)
class Problem:
    place: Place
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


@dataclass
class Document:
    """Values of a YAML text, the place of each dotted path, and what was wrong with it."""

    values: Any = None
    places: dict[Path, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def place(self, path: Path) -> Place:
        """The place of ``path``, or of its nearest parent that was written."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places[path]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own protocol


class _Dumper(yaml.SafeDumper):
    """Quotes text that either YAML 1.1 (inherited) or 1.2 (added below) would read as something else."""


for _name, _pattern, _first in _RESOLVERS:
    _anchored = re.compile(f"(?:{_pattern.pattern})$")
    _Loader.add_implicit_resolver(_TAG + _name, _anchored, _first)
    _Dumper.add_implicit_resolver(_TAG + _name, _anchored, _first)


def dump(values: Any) -> str:
    """YAML text that both this reader and YAML 1.1 readers take for the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def read(text: str, place_of_line: Callable[[int], Place]) -> Document:
    """Parse ``text``. ``place_of_line`` names the place of a line, counted from 1.

    Never raises for what the text holds: see ``Document.problems``. After a syntax error, ``values``
    is None.
    """
    document = Document(places={(): place_of_line(1)})
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        document.problems.append(
            Problem(place_of_line(line), f"character {chr(error.character)!r} is not allowed; remove it")
        )
        return document
    except yaml.MarkedYAMLError as error:
        document.problems += _syntax_problems(text, error, place_of_line)
        return document
    except RecursionError:
        document.problems.append(Problem(place_of_line(1), "nested too deeply; a recipe has a few levels"))
        return document
    finally:
        if loader is not None:
            loader.dispose()
    if node is not None:
        reader = _Reader(document, place_of_line, len(text) + _FROM_ALIASES)
        try:
            document.values = reader.value(node, ())
        except _TooMany:
            reason = (
                f"the aliases (*name) of this document stand for more than {_FROM_ALIASES:,} values; write them out"
            )
            document.problems = [Problem(place_of_line(1), reason)]
    return document


def _syntax_problems(text: str, error: yaml.MarkedYAMLError, place_of_line: Callable[[int], Place]) -> list[Problem]:
    tabs = [n for n, line in enumerate(text.splitlines(), 1) if "\t" in line[: len(line) - len(line.lstrip())]]
    if tabs:
        return [Problem(place_of_line(n), "a tab in the indentation; YAML wants spaces") for n in tabs]
    mark = error.problem_mark or error.context_mark
    what = f"{error.problem or error.context or 'unreadable'}; correct it"
    if "single document" in (error.context or ""):
        what = "a second document starts here; remove the '---' line"
    elif error.context and error.context_mark:
        what = f"{error.problem}, {error.context} that starts in line {error.context_mark.line + 1}; correct it"
    return [Problem(place_of_line(mark.line + 1 if mark else 1), f"not valid YAML: {what}")]


class _Reader:
    """Turns nodes into values, noting places and problems in the document.

    Args:
        most: values that it makes. Each that is written takes a character at least, or stands behind one.
    """

    def __init__(self, document: Document, place_of_line: Callable[[int], Place], most: int) -> None:
        self.document = document
        self.place_of_line = place_of_line
        self._left = most

    def problem(self, node: yaml.Node, text: str) -> None:
        self.document.problems.append(Problem(self._place(node), text))

    def _place(self, node: yaml.Node) -> Place:
        return self.place_of_line(node.start_mark.line + 1)

    def value(self, node: yaml.Node, path: Path) -> Any:
        self._left -= 1
        if self._left < 0:
            raise _TooMany
        if len(path) > _MAX_DEPTH:
            self.problem(node, "nested too deeply (or an alias that contains itself); write it out")
            return None
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            items = []
            for i, item in enumerate(node.value):
                self.document.places[(*path, i)] = self._place(item)
                items.append(self.value(item, (*path, i)))
            return items
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        self.problem(node, f"the tag {node.tag!r} is not supported; write a plain value")
        return None

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _TAG + "str":
                self.problem(key_node, f"a key must be a name, not {_shown(key_node)}; quote it or rename it")
                continue
            where = (*path, key)
            if key in values:
                first = self.document.places[where]
                self.problem(key_node, f"key {dotted(where)!r} was already given at {first}; keep one")
                continue
            self.document.places[where] = self._place(key_node)
            values[key] = self.value(value_node, where)
        return values

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        text = node.value
        try:
            match node.tag.removeprefix(_TAG):
                case "str":
                    return text
                case "null":
                    return None
                case "bool":
                    return {"true": True, "false": False}[text.lower()]
                case "int":
                    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
                case "float":
                    return _float(text)
        except (ValueError, KeyError):
            self.problem(node, f"{text[:40]!r} does not fit its tag {node.tag!r}; write a plain value")
            return None
        self.problem(node, f"the tag {node.tag!r} is not supported; write a plain value")
        return None


def _float(text: str) -> float:
    plain = text.lower().lstrip("+-")
    if plain in (".inf", ".nan"):
        return math.nan if plain == ".nan" else math.copysign(math.inf, -1 if text.startswith("-") else 1)
    return float(text)


def _shown(node: yaml.Node) -> str:
    return repr(node.value) if isinstance(node, yaml.ScalarNode) else "a list or a mapping"


def dotted(path: Path) -> str:
    """``('data', 'include', 0)`` -> ``data.include[0]``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
