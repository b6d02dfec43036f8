"""What is wrong with one key of a recipe, and what to do, in words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import ValidationError

from trainer.recipe_hints import unknown_key, word_hint
from trainer.schema import KEYS, NAMED, children, schema_path
from trainer.yaml_lines import Path, dotted

_RANGES = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "more than"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "less than"),
}
_BOUNDS = tuple(_RANGES.values())
_WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "dataclass_type": "a mapping of keys",
}
_PLAIN = {int: "a whole number", float: "a number", str: "text"}


def _alternatives(annotation: Any) -> list[Any]:
    """The types that a key takes, None left out."""
    union = get_origin(annotation) in (Union, UnionType)
    return [part for part in get_args(annotation) if part is not type(None)] if union else [annotation]


_SEVERAL = {path for path, key in KEYS.items() if len(_alternatives(key.annotation)) > 1}


def _described(annotation: Any) -> str:
    """One type in words.

    >>> _described(tuple[int, ...]), _described(Literal["auto"])
    ('a list of whole numbers', 'auto')
    """
    if choices := _choices(annotation):
        return " or ".join(choices)
    if get_origin(annotation) is tuple:
        return f"a list of {_PLAIN[get_args(annotation)[0]].removeprefix('a ')}s"
    base, *bounds = get_args(annotation) or (annotation,)
    limits = [f", {words} {getattr(b, name):g}," for b in bounds for name, words in _BOUNDS if hasattr(b, name)]
    return f"{_PLAIN[base]}{''.join(limits)}"


def message(path: Path, error: Mapping[str, Any]) -> str:
    """For an error of :func:`alternatives_joined` at the key ``path``."""
    key, kind, value = dotted(path), error["type"], error.get("input")
    names = schema_path(path)
    if kind == "unexpected_keyword_argument":
        return unknown_key(path)
    if kind == "missing":
        if KEYS[names].section:
            return f"missing section {key}; it has the keys {', '.join(children(names))}"
        return f"missing key {key}; add '{path[-1]}: {_example(names)}'"
    if kind == "literal_error":
        choices = _choices(KEYS[names].annotation)
        return f"{key} is {shown(value)}; choose {' or '.join(choices)}{word_hint(value, choices)}"
    if kind == "several":
        wanted = " or ".join(map(_described, _alternatives(KEYS[names].annotation)))
        entry = f" with {shown(error['entry'])} in it" if "entry" in error else ""
        return f"{key} must be {wanted}, not {'a list' if entry else shown(value)}{entry}; change it"
    if kind in _RANGES:
        bound, words = _RANGES[kind]
        return f"{key} must be {words} {error['ctx'][bound]:g}, not {shown(value)}; change it"
    if kind in ("too_short", "string_too_short"):
        return f"{key} is empty; give at least one entry or remove the key"
    if kind in _WANTED:
        remedy = "change it"
        if kind == "tuple_type":
            remedy = f"write [{json.dumps(value)}]" if isinstance(value, str) else "write [..., ...]"
        elif kind == "dataclass_type":
            below = children((*names, "*") if names in NAMED else names)
            remedy = f"its keys are {', '.join(below)}" if below else remedy
        elif value is None:
            remedy = "give a value or remove the key"
        return f"{key} must be {_WANTED[kind]}, not {shown(value)}; {remedy}"
    return f"{key or 'the recipe'}: {error['msg']}; change it"


def _choices(annotation: Any) -> list[str]:
    found: list[str] = []
    for part in get_args(annotation):
        found += [part] if isinstance(part, str) else _choices(part)
    return found


def _example(names: tuple[str, ...]) -> str:
    annotation = KEYS[names].annotation
    if choices := _choices(annotation):
        return " | ".join(choices)
    base = get_args(annotation)[0] if get_args(annotation) and get_origin(annotation) is not tuple else annotation
    return {int: "<whole number>", float: "<number>", str: "<text>", bool: "true"}.get(base, "[...]")


def shown(value: Any) -> str:
    """A value of a recipe, in a message."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return f"the switch {str(value).lower()}"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text {value[:60]!r}"
    return "a list" if isinstance(value, list) else "a mapping"


def alternatives_joined(error: ValidationError) -> list[dict[str, Any]]:
    """Pydantic's errors; of a key that takes values of several types, all refusals as one of type ``several``."""
    errors: dict[tuple[Path, str], dict[str, Any]] = {}
    for one in error.errors(include_url=False):
        path, kind, within = tuple(one["loc"]), one["type"], {}
        key = next((path[:n] for n in range(1, len(path) + 1) if schema_path(path[:n]) in _SEVERAL), None)
        if key is not None:
            # What pydantic puts behind the key is the alternative, and behind that an entry of the list.
            within = {"entry": one.get("input")} if len(path) > len(key) + 1 else {}
            path, kind = key, "several"
        errors[path, kind] = {**one, **errors.get((path, kind), {}), **within, "loc": path, "type": kind}
    return list(errors.values())
