"""`planaria export RUN OUT`: a run's newest verified checkpoint, or another, as a Hugging Face folder.

A trained model is written with transformers' own ``save_pretrained``, so any tool that reads its family reads it. An
adapter run's base is copied as it is, byte for byte, and the adapter goes to ``OUT/adapter``; those of tenants go to
``OUT/adapters/NAME``.
"""

from __future__ import annotations

import math
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from checkpointing.heldout import best_of, losses_of
from checkpointing.materialise import whole
from checkpointing.recovery import RecoveryError
from checkpointing.store import Checkpoint, list_checkpoints, step_folders, verify
from lora.format import save_adapter
from lora.peft_format import lost_dropout
from lora.tenant_rules import alone
from lora.trained import frozen_tensors
from moe.bias import EXTRA
from moe.build import new_config
from moe.family_table import family_of
from moe.fingerprint import fingerprint
from moe.load import persistent_buffers, read_config
from moe.mtp import PREFIX
from moe.save import whole_model, write_folder
from trainer.build import shape_fields
from trainer.model_shapes import model_shapes
from trainer.plan import base_of
from trainer.recipe import RecipeError, load_recipe
from trainer.routing import inexpressible, set_routing
from trainer.runfolder import checkpoints_of
from trainer.schema import Recipe


class ExportError(ValueError):
    """The run cannot be exported; the message says what is missing and where."""


def main(run_dir: str, out_dir: str, inexact: bool = False, step: int | Literal["best"] | None = None) -> int:
    """``step``: the newest checkpoint if None; ``best``: the one with the lowest held-out loss. Raises ExportError."""
    run, out = Path(run_dir), Path(out_dir)
    recipe, checkpoint = open_run(run, best_step(run) if step == "best" else step)
    if recipe.model.soft.kind != "none":
        raise ExportError(
            f"{run} trained soft blocks (model.soft.kind: {recipe.model.soft.kind}), which no Hugging Face class has; "
            "its checkpoints hold every tensor under its path"
        )
    if out.exists() and any(out.iterdir()):
        raise ExportError(f"{out} exists and is not empty; give another folder or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        _write(recipe, run, checkpoint, temporary, inexact)
        temporary.chmod(0o755)
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    what = f"base model and adapter{'s' * bool(recipe.tenants)}" if recipe.adapter else "model"
    print(f"exported {what} of step {checkpoint.step} to {out}")
    return 0


def _write(recipe: Recipe, run: Path, checkpoint: Checkpoint, temporary: Path, inexact: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="planaria-", dir=temporary.parent) as scratch:
        partly = recipe.model.frozen_experts or recipe.model.trainable_experts
        base = _frozen_tensors(recipe, checkpoint) if partly else {}
        redone = whole(checkpoint, Path(scratch), inexact)
        tensors = trained_tensors(redone, base)
        bias = redone.extras(redone.manifest["coordinates"][0]).get(EXTRA)
    if recipe.train.mtp.depth:
        tensors = _without_mtp(tensors)
    if recipe.adapter:
        _copy_base(recipe, temporary)
        if recipe.data.format == "chat" and recipe.data.chat_template != "model":
            _copy_template(run, temporary)
        if recipe.tenants:
            _write_tenants(recipe, tensors, temporary / "adapters")
        else:
            write_adapter(recipe, tensors, temporary / "adapter")
    else:
        _write_model(recipe, run, tensors, bias, temporary, inexact)
        _copy_tokenizer(run, temporary)


def open_run(run: Path, step: int | None = None) -> tuple[Recipe, Checkpoint]:
    """A run's recipe, and its checkpoint of ``step``, by default the newest, whose every byte verifies.

    Raises ExportError if there is none.
    """
    if not (run / "recipe.yaml").is_file():
        raise ExportError(f"{run} is not a run folder: it has no recipe.yaml")
    try:
        recipe = load_recipe(run / "recipe.yaml")
    except RecipeError as error:
        raise ExportError(f"{run}: its recipe does not load: {error}") from error
    reasons: list[str] = []
    place = checkpoints_of(recipe, run)
    for found, folder in reversed(step_folders(place)):
        if step not in (None, found):
            continue
        problems = verify(folder)
        if not problems:
            return recipe, Checkpoint.open(folder)
        if step is None:
            print(f"step {found} is passed over: {problems[0]}", file=sys.stderr, flush=True)
        reasons += problems
    absent = "none was written; set checkpoint.disk.final=true and run again"
    why = "; ".join(reasons) or (absent if step is None else f"step {step} is not there")
    raise ExportError(f"{place} has no usable checkpoint: {why}")


def best_step(run: Path) -> int:
    """The step with the lowest held-out loss of those that have a checkpoint. Raises ExportError if there is none."""
    if not (run / "recipe.yaml").is_file():
        raise ExportError(f"{run} is not a run folder: it has no recipe.yaml")
    place, losses = checkpoints_of(load_recipe(run / "recipe.yaml"), run), losses_of(run)
    steps = [step for step, _ in list_checkpoints(place)]
    best, lowest = best_of(losses, steps), best_of(losses, losses)
    if best is None:
        there = ", ".join(map(str, steps)) or "none"
        evaluated = ", ".join(map(str, losses)) or "none"
        raise ExportError(
            f"{run} has no best step: none of its checkpoints (steps {there}) has a held-out loss (steps {evaluated}); "
            "set train.eval_every to a multiple of checkpoint.disk.every, or export --step last or a step's number"
        )
    print(f"step {best} has the lowest held-out loss of the checkpoints there are: {losses[best]:.4f} nats", flush=True)
    if lowest is not None and losses[lowest] < losses[best]:
        print(
            f"step {lowest} had {losses[lowest]:.4f} nats, but no checkpoint of it is there; let checkpoint.disk.every "
            "divide train.eval_every",
            flush=True,
        )
    return best


def _frozen_tensors(recipe: Recipe, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The base model's parameters by path, in the dtype that the run trained in."""
    path = recipe.model.path or ""
    if not Path(path).is_dir() or fingerprint(path) != checkpoint.manifest["metadata"]["base"]:
        raise ExportError(f"the base model {path} is gone or not what the run trained; put it back")
    dtype = next(iter(checkpoint.manifest["tensors"].values()))["dtype"]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def trained_tensors(checkpoint: Checkpoint, base: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Every trained parameter, whole, by its path: fp32 masters cast to the dtype the model trained in.

    Args:
        base: where frozen parameters, and the frozen experts of trained ones, come from.
    Raises RecoveryError naming layer, expert and tensor if any byte is missing or held twice.
    """
    parts: dict[str, dict[int | None, Tensor]] = defaultdict(dict)
    facts: dict[str, dict[str, Any]] = {}
    for unit, fact in checkpoint.manifest["tensors"].items():
        parts[fact["param"]][fact["expert"]] = torch.from_numpy(checkpoint.assemble(unit, "master").copy())
        facts[fact["param"]] = fact
    whole = {}
    for param, pieces in parts.items():
        shape = facts[param]["shape"]
        if None in pieces:
            flat = pieces[None]
        else:
            if base:
                pieces = {e: base[param][e].flatten() for e in range(shape[0])} | pieces
            missing = [e for e in range(shape[0]) if e not in pieces]
            if missing:
                raise RecoveryError(f"{param}: experts {missing} are missing from the checkpoint")
            flat = torch.cat([pieces[e] for e in range(shape[0])])
        if flat.numel() != math.prod(shape):
            raise RecoveryError(f"{param}: {flat.numel()} elements in the checkpoint, {math.prod(shape)} expected")
        whole[param] = flat.view(*shape).to(getattr(torch, facts[param]["dtype"]))
    return {**(base or {}), **whole}


def _without_mtp(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' classes have no place for the prediction modules, and generation does without them."""
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(PREFIX)}
    count = sum(tensor.numel() for tensor in tensors.values()) - sum(tensor.numel() for tensor in kept.values())
    print(f"left out: the {count:,} parameters of the multi-token prediction modules, which the checkpoint keeps")
    return kept


def exported_model(recipe: Recipe, tensors: dict[str, Tensor]) -> PreTrainedModel:
    """The run's model with these parameters, whole; persistent buffers as the run began with them.

    Raises FamilyError if they are not the model's.
    """
    if recipe.model.path is not None:
        config = read_config(recipe.model.path)
    else:
        vocab_size = tensors["model.embed_tokens.weight"].shape[0]
        config = new_config(recipe.model.family, shape_fields(recipe), vocab_size=vocab_size)
    return whole_model(config, tensors, recipe.model.path)


def buffers_of(recipe: Recipe, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The persistent buffers of :func:`exported_model`, by path, and of prediction modules; most families have none."""
    family = recipe.model.family or read_config(recipe.model.path or "").model_type
    if not family_of(family).buffers:
        return {}
    model = exported_model(recipe, {name: t for name, t in tensors.items() if not name.startswith(PREFIX)})
    found, layers = persistent_buffers(model), model.config.num_hidden_layers
    last = f"model.layers.{layers - 1}."
    # A prediction module's layer is like the last one, and its buffers stay as they were made.
    made = {
        f"{PREFIX}{layers + k}.block.{name.removeprefix(last)}": torch.zeros_like(buffer)
        for k in range(recipe.train.mtp.depth)
        for name, buffer in found.items()
        if name.startswith(last)
    }
    return {**found, **made}


def _write_model(
    recipe: Recipe, run: Path, tensors: dict[str, Tensor], bias: bytes | None, out: Path, inexact: bool
) -> None:
    model = exported_model(recipe, tensors)
    _check_routing(inexpressible(recipe, model.config), inexact)
    set_routing(recipe, model, bias)
    # Dropout is a property of the training run, not of the exported model.
    model.config.attention_dropout = 0.0
    model.config.use_cache = True
    model.generation_config.eos_token_id = model.config.eos_token_id = _end_token(run)
    write_folder(model, out)


def _check_routing(problems: list[str], inexact: bool) -> None:
    """A folder that loads and computes something else would be the worst outcome, so it takes the user's word."""
    if problems and not inexact:
        raise ExportError(
            f"{'; '.join(problems)}. The exported model would compute something else; add --inexact to write it "
            "all the same, without that"
        )
    for problem in problems:
        print(f"warning: {problem}; the exported model computes something else", flush=True)


def _end_token(run: Path) -> int | None:
    return AutoTokenizer.from_pretrained(run / "tokenizer").eos_token_id


def _copy_tokenizer(run: Path, out: Path) -> None:
    for file in (run / "tokenizer").iterdir():
        shutil.copy2(file, out / file.name)


def _copy_template(run: Path, out: Path) -> None:
    """The base's tokenizer has no template, or another one than the adapter was trained with."""
    template = "chat_template.jinja"
    shutil.copy2(run / "tokenizer" / template, out / template)
    print(f"added: {template}, by which the adapter's training samples were written")


def _copy_base(recipe: Recipe, out: Path) -> None:
    base = Path(recipe.model.path or "")
    if not base.is_dir():
        raise ExportError(f"the base model {base} is gone; put it back where the recipe's model.path points")
    for file in base.iterdir():
        if file.is_file():
            shutil.copy2(file, out / file.name)


def _write_tenants(recipe: Recipe, tensors: dict[str, Tensor], out: Path) -> None:
    """Each tenant's adapter as a folder of its own, as if it had trained alone."""
    written = []
    for name in recipe.tenants:
        own = alone(tensors, name)
        if broken := [path for path, tensor in own.items() if not tensor.isfinite().all()]:
            print(
                f"left out: the adapter of {name}, whose {broken[0]} is not finite: its training diverged", flush=True
            )
            continue
        write_adapter(recipe, own, out / name)
        written.append(name)
    if not written:
        raise ExportError("every tenant's adapter holds values that are no numbers; lower their lr and train again")
    print(f"adapters of {', '.join(written)}")


def write_adapter(recipe: Recipe, tensors: dict[str, Tensor], out: Path) -> None:
    """``tensors`` are the run's adapter, whole; the places of its base tell which bank each belongs to."""
    base = recipe.model.path or ""
    parallel = recipe.parallel
    topology = {name: getattr(parallel, name) for name in ("workers", "ep", "zero", "dtype")}
    tensors = tensors | frozen_tensors(recipe.adapter)
    shapes, _, active = base_of(recipe)
    places = model_shapes(shapes, active).places
    save_adapter(out, tensors, recipe.adapter, fingerprint(base), base_model=base, topology=topology, places=places)
    if line := lost_dropout(out, recipe.adapter):
        print(line, flush=True)
