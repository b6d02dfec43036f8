"""The only reader of recipes: YAML and overrides in, a :class:`Recipe` out, or every problem at once.

A problem reads ``file:line: what; what to do`` (for an override: ``argument 'train.lr=x': ...``).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import Any

from pydantic import TypeAdapter, ValidationError

from checkpointing.storage import place_of
from lora.combinations import used_fields
from lora.presets import expand
from moe.family_table import FAMILIES, resolved
from trainer import tenant_recipe, yaml_lines
from trainer.adapter_seal import adapter_seal
from trainer.data_rules import CHAT_KEYS, resolved_chat
from trainer.esft_file import selection_digest
from trainer.optimizer_rules import resolved_optimizer
from trainer.recipe_checks import BYTE_VOCABULARY, WITH_PATH, findings
from trainer.recipe_hints import meant
from trainer.recipe_messages import alternatives_joined, message, shown
from trainer.schema import (
    KEYS,
    CheckpointSection,
    DataSection,
    LogSection,
    ModelSection,
    ParallelSection,
    Recipe,
    TrainSection,
    children,
)
from trainer.yaml_lines import Document, Path, Place, Problem, dotted

__all__ = [
    "CheckpointSection",
    "DataSection",
    "LogSection",
    "ModelSection",
    "ParallelSection",
    "Recipe",
    "RecipeError",
    "TrainSection",
    "check_world",
    "load_recipe",
    "recipe_fingerprint",
    "recipe_to_yaml",
    "recipe_values",
    "recipe_warnings",
]

_SCHEMA: TypeAdapter[Recipe] = TypeAdapter(Recipe)


class RecipeError(ValueError):
    """The recipe cannot be used. ``problems`` has one line each; ``str()`` is all of them."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe; ``overrides`` are ``section.key=value`` with YAML values.

    Raises RecipeError with every problem found.
    """
    path = FilePath(path)
    document = yaml_lines.read(_text_of(path), lambda line: Place(line, f"{path}:{line}"))
    if document.values is None and not document.problems:
        document.problems.append(Problem(document.place(()), "the recipe is empty; copy one from recipes/"))
    elif document.values is not None and not isinstance(document.values, dict):
        document.problems.append(
            Problem(
                document.place(()),
                f"the top level is {shown(document.values)}; a recipe is a mapping of sections "
                f"({', '.join(children(()))})",
            )
        )
        document.values = None
    if document.values is not None:
        for number, override in enumerate(overrides):
            _override(document, override, number)
        recipe = _checked(document)
        if recipe is not None and not document.problems:
            return _resolved(recipe, path)
    raise RecipeError([str(problem) for problem in sorted(set(document.problems))])


def _text_of(path: FilePath) -> str:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise RecipeError([f"{path}: no such file; give the path of a recipe"]) from None
    except IsADirectoryError:
        raise RecipeError([f"{path}: a folder; give the path of a recipe file in it"]) from None
    except OSError as error:
        raise RecipeError([f"{path}: cannot be read ({error.strerror}); check its permissions"]) from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            [f"{path}:{line}: byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8"]
        ) from None


def _override(document: Document, override: str, number: int) -> None:
    place = Place(1_000_000_000 + number, f"argument {override!r}")
    key, equals, text = override.partition("=")
    names = tuple(key.split("."))
    if not equals or not all(names):
        document.problems.append(Problem(place, "not an override; write section.key=value"))
        return
    parsed = yaml_lines.read(text, lambda line: place)
    if parsed.problems:
        document.problems += parsed.problems
        return
    node = document.values
    for i, name in enumerate(names[:-1], 1):
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            problem = f"{dotted(names[:i])} is {shown(node)}, it has no key {names[i]!r}"
            document.problems.append(Problem(place, f"{problem}; set {dotted(names[:i])} itself"))
            return
        document.places.setdefault(names[:i], place)
    node[names[-1]] = parsed.values
    for old in [p for p in document.places if p[: len(names)] == names]:
        del document.places[old]
    for below in parsed.places:
        document.places[(*names, *below)] = place


def _checked(document: Document) -> Recipe | None:
    """The recipe, or None with its problems added to ``document``."""
    recipe: Recipe | None = None
    bad: set[Path] = set()
    unreadable = {problem.place for problem in document.problems}
    try:
        recipe = _SCHEMA.validate_json(json.dumps(document.values), strict=True)
    except ValidationError as error:
        errors = sorted(alternatives_joined(error), key=lambda one: one["type"] == "missing")
        for one in errors:
            path: Path = tuple(one["loc"])
            already_said = (one["type"] == "missing" and path in bad) or (
                one.get("input") is None and document.place(path) in unreadable
            )
            if one["type"] == "unexpected_keyword_argument":
                # The key that was meant has a value that we do not know: it is neither missing nor its default.
                bad.update(_with_bank(names, path) for names in meant(path))
            else:
                bad.add(path)
            if not already_said:
                document.problems.append(Problem(document.place(path), message(path, one)))
    for key, text in findings(document.values, bad):
        if isinstance(key, str):
            key = tuple(int(part) if part.isdecimal() else part for part in key.split("."))
        document.problems.append(Problem(document.place(key), text))
    return recipe


def _with_bank(names: tuple[str, ...], path: Path) -> Path:
    return tuple(path[1] if part == "*" and len(path) > 2 else part for part in names)


def _resolved(recipe: Recipe, path: FilePath) -> Recipe:
    """Defaults that depend on other keys or on where the recipe lies, written out."""
    model, data = recipe.model, recipe.data
    if model.family is not None:
        model = dataclasses.replace(model, **resolved(model.family, vars(model)))
    if data.tokenizer.kind == "bytes":
        data = dataclasses.replace(data, tokenizer=dataclasses.replace(data.tokenizer, vocab_size=BYTE_VOCABULARY))
    if data.source == "files":
        folder = path.resolve().parent
        data = dataclasses.replace(data, include=tuple(str(folder / pattern) for pattern in data.include))
    if data.format == "jsonl" and data.text_key is None:
        data = dataclasses.replace(data, text_key="text")
    if data.format == "chat":
        data = resolved_chat(data, path.resolve().parent)
    banks = {
        name: expand(dataclasses.replace(bank, adapters=tuple(map(os.path.abspath, bank.adapters))))
        for name, bank in recipe.adapter.items()
    }
    log = recipe.log if recipe.log.run else dataclasses.replace(recipe.log, run=path.stem)
    checkpoint, disk = recipe.checkpoint, recipe.checkpoint.disk
    place = place_of(disk.url or "")
    if disk.url is not None and isinstance(place, FilePath):
        # The keeper, which writes there, has a current folder of its own.
        checkpoint = dataclasses.replace(checkpoint, disk=dataclasses.replace(disk, url=os.path.abspath(place)))
    source = place_of(checkpoint.load_from or "")
    if checkpoint.load_from is not None and isinstance(source, FilePath):
        checkpoint = dataclasses.replace(checkpoint, load_from=os.path.abspath(source))
    train = resolved_optimizer(recipe.train)
    recipe = dataclasses.replace(
        recipe, train=train, model=model, data=data, adapter=banks, log=log, checkpoint=checkpoint
    )
    return dataclasses.replace(recipe, tenants=tenant_recipe.resolved(recipe, path.resolve().parent))


def recipe_values(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values, without the keys that its other keys forbid."""
    values = dataclasses.asdict(recipe)
    model = values["model"]
    if recipe.model.path is not None:
        values["model"] = {name: model[name] for name in WITH_PATH if model[name] is not None}
    else:
        family = FAMILIES[model["family"]]
        values["model"] = {name: v for name, v in model.items() if v is not None and not family.lacks(name)}
    for name in ("routing", "balance"):
        given = {key: value for key, value in values.pop(name).items() if value != KEYS[name, key].default}
        if given:
            values[name] = given
    data = values["data"]
    data["include"] = list(data["include"])
    if data["tokenizer"]["kind"] == "model":
        del data["tokenizer"]["vocab_size"]
    if values["checkpoint"]["disk"]["url"] is None:
        del values["checkpoint"]["disk"]["url"]
    if values["checkpoint"]["load_from"] is None:
        del values["checkpoint"]["load_from"]
    values["train"] = {key: value for key, value in values["train"].items() if value is not None}
    if recipe.train.optimizer == "adamw":
        del values["train"]["optimizer"]  # runs of before the key was there may be resumed
    if tenants := tenant_recipe.plain(values.pop("tenants")):
        values["tenants"] = tenants
    for name in ("cache_dir", "text_key", *CHAT_KEYS):
        if data[name] is None:
            del data[name]
    checkpoint = values["checkpoint"]
    exact = checkpoint["pec"]["fallback"] if checkpoint["mode"] == "pec" else checkpoint["mode"]
    if exact != "wal":
        del checkpoint["wal"]
    if checkpoint["mode"] != "pec":
        del checkpoint["pec"]
    for name, bank in recipe.adapter.items():
        found = {key: getattr(bank, key) for key in used_fields(bank)}
        values["adapter"][name] = {key: list(v) if isinstance(v, tuple) else v for key, v in found.items()}
    return values


def recipe_to_yaml(recipe: Recipe) -> str:
    """YAML that :func:`load_recipe` reads back as an equal recipe."""
    return yaml_lines.dump(recipe_values(recipe))


def recipe_fingerprint(recipe: Recipe) -> str:
    """16 hex digits that change with everything that can change the run's bits.

    Left out is what only says how a run is kept and watched, so that it may change when a run is resumed: ``log``,
    ``checkpoint`` but for its ``load_from``, ``parallel``'s ``restarts``, ``deadlines`` and ``memory_gib``,
    ``data.cache_dir`` and the evaluation's frequency and size.
    """
    values = recipe_values(recipe)
    del values["log"], values["checkpoint"]
    for name in ("restarts", "deadlines", "memory_gib"):
        del values["parallel"][name]
    del values["train"]["eval_every"], values["train"]["eval_sequences"]
    values["data"].pop("cache_dir", None)
    if recipe.checkpoint.load_from is not None:
        values["load_from"] = recipe.checkpoint.load_from
    if recipe.model.trainable_experts is not None:
        values["model"]["trainable_experts"] = selection_digest(recipe.model.trainable_experts)
    for name, bank in recipe.adapter.items():
        if bank.adapters:
            values["adapter"][name]["adapters"] = [adapter_seal(folder) for folder in bank.adapters]
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def recipe_warnings(recipe: Recipe) -> list[str]:
    """What is allowed and probably not meant."""
    warnings = []
    checkpoint = recipe.checkpoint
    if not checkpoint.memory.enabled and not checkpoint.disk.every:
        warnings.append(
            "checkpoint: memory is off and disk.every is 0, so a failure starts the run from step 0; "
            "turn one of them on"
        )
    layers = recipe.model.num_hidden_layers - (recipe.model.first_k_dense_replace or 0)
    k, ep = checkpoint.pec.k_snapshot, recipe.parallel.ep
    if checkpoint.mode == "pec" and k != "auto" and k * layers % ep:
        warnings.append(
            f"checkpoint.pec: k_snapshot={k} x {layers} layers is no multiple of parallel.ep={ep}, so some workers "
            "write more than others"
        )
    every, evaluated = checkpoint.disk.every, recipe.train.eval_every
    if every and evaluated % every:
        warnings.append(
            f"train.eval_every={evaluated} is no multiple of checkpoint.disk.every={every}, so some evaluated steps "
            "have no checkpoint for `planaria export --step best`"
        )
    if recipe.train.min_lr_ratio == 1.0 and recipe.train.schedule == "cosine":
        warnings.append("train: min_lr_ratio 1 makes the cosine schedule constant")
    return warnings


def check_world(recipe: Recipe, world: int) -> None:
    """Raises RecipeError unless the launcher started ``parallel.workers`` processes."""
    if world != recipe.parallel.workers:
        raise RecipeError(
            [
                f"the launcher started WORLD_SIZE={world} workers, the recipe says "
                f"parallel.workers={recipe.parallel.workers}; start that many, or add the argument "
                f"parallel.workers={world}"
            ]
        )
