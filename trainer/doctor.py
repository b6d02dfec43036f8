"""`planaria doctor MODEL`: is it whole, do we compute it as transformers does, and does all of it train?

MODEL is a Hugging Face folder, or a recipe. Everything runs on the CPU, in this process. Exit status: 0 all is well,
1 a check failed (said which, where, and what to do), 2 the user's mistake.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from checkpointing.keeper.memory import available_bytes
from moe.build import new_config, new_model
from moe.dispatch_choice import choose_dispatch
from moe.families import find_moe_blocks
from moe.family_table import DENSE
from moe.layout import Layout
from moe.quantised import quantisation
from trainer.build import shape_fields, training_dtype
from trainer.doctor_files import DoctorError, check_folder, digests
from trainer.doctor_model import check_model, describe
from trainer.doctor_report import Report
from trainer.doctor_training import check_training
from trainer.recipe import load_recipe
from trainer.rendezvous import choose_device
from trainer.schema import Recipe

_BYTES_PER_PARAMETER = 12  # fp32 weights, and two sets of gradients to compare
_SLACK = 2**29  # activations, logits


def main(model: str, overrides: Sequence[str], json_path: str | None, files_only: bool) -> int:
    """Returns the exit status. Raises DoctorError, RecipeError or FamilyError for what cannot be looked at."""
    report, place = Report(model), Path(model)
    if place.is_dir():
        if overrides:
            raise DoctorError(f"{overrides[0]}: a model folder has no keys to set; give a recipe instead")
        _folder(place, report, files_only)
    elif place.suffix in (".yaml", ".yml"):
        _recipe(load_recipe(place, overrides), report, files_only)
    else:
        raise DoctorError(f"{model} is neither a folder nor a recipe (.yaml); give a Hugging Face folder or a recipe")
    failures = sum(f.state == "failed" for f in report.findings)
    print("all is well" if report.ok else f"{failures} findings; see docs/doctor.md for what each check means")
    if json_path is not None:
        try:
            Path(json_path).write_text(json.dumps(report.as_json(), indent=1))
        except OSError as error:  # of a full disk it would not say the file
            raise DoctorError(f"--json {json_path}: {error.strerror}; give another file") from None
    return 0 if report.ok else 1


def _folder(folder: Path, report: Report, files_only: bool) -> dict[str, str]:
    """Returns checksums of what transformers loaded; none if it was not asked to."""
    config = config_of(folder)
    top_k = _describe(config, report)
    sound = check_folder(folder, _on_meta(config), report)
    if files_only or not sound:
        report.skipped("parity", "--files-only" if files_only else "the files must be mended first")
        return {}
    _check_memory(config)
    disable_progress_bar()
    # transformers' own loader and model: the reference must not depend on ours.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded = digests(model.named_parameters())
    _compare(model, report, top_k)
    return loaded


def _compare(model: Any, report: Report, top_k: int) -> None:
    if _is_dense(model.config):
        report.skipped("parity", "transformers' own modules run a dense model, there is nothing of ours to compare")
        return
    report.fact("attention", model.config._attn_implementation)
    blocks: Any = check_model(model, report, top_k)
    backend = blocks[0].experts.backend
    report.fact("experts run here as", f"{backend.name}: {backend.reason}")


def _recipe(recipe: Recipe, report: Report, files_only: bool) -> None:
    section, loaded = recipe.model, {}
    if section.path is not None:
        loaded = _folder(Path(section.path), report, files_only)
        vocabulary = config_of(Path(section.path)).vocab_size
    else:
        assert section.family is not None
        fields, vocabulary = shape_fields(recipe), recipe.data.tokenizer.vocab_size
        config = new_config(section.family, fields, vocab_size=vocabulary)
        top_k = _describe(config, report)
        if not files_only:
            _check_memory(config)
            seed = recipe.train.seed
            _compare(
                new_model(section.family, fields, vocab_size=vocabulary, seed=seed, dtype=torch.float32), report, top_k
            )
    _report_layout(recipe, report)
    if files_only or report.has_failed("files") or report.has_failed("numbers"):
        report.skipped("training", "--files-only" if files_only else "the files must be mended first")
    else:
        check_training(recipe, vocabulary, loaded, report)


def config_of(folder: Path) -> Any:
    """Raises DoctorError if the folder has no configuration that transformers knows."""
    if not (folder / "config.json").is_file():
        raise DoctorError(f"{folder} has no config.json; give a Hugging Face model folder")
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # its checks raise all kinds
        raise DoctorError(f"{folder}/config.json: transformers does not take it: {_words(error)}; mend it") from None
    if why := quantisation(folder, config.to_dict()):
        raise DoctorError(why)
    return config


def _on_meta(config: Any) -> Any:
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # a KeyError for an activation without a name, and others
        why = f"{type(error).__name__}: {_words(error)}"
        raise DoctorError(f"transformers can make no {config.model_type} of this configuration: {why}") from None


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _describe(config: Any, report: Report) -> int:
    """Facts of the architecture; returns experts per token, 0 for a dense model."""
    model = _on_meta(config)
    if _is_dense(config):
        report.fact("family", f"{config.model_type}, dense: a base for adapters")
        report.fact("parameters", f"{sum(p.numel() for p in model.parameters()):,}, all active")
        report.fact("dtype", _dtype(config))
        return 0
    blocks, top_k = find_moe_blocks(model), int(config.num_experts_per_tok)
    if not 1 <= top_k <= blocks[0].experts.num_experts:
        raise DoctorError(
            f"config.json chooses num_experts_per_tok={top_k} of {blocks[0].experts.num_experts} experts; mend it"
        )
    sizes = describe(model, top_k)
    report.fact("family", config.model_type)
    report.fact("MoE layers", f"{len(blocks)}, {blocks[0].experts.num_experts} experts each, {top_k} per token")
    report.fact("parameters", f"{sizes['total']:,}, {sizes['active']:,} active, {sizes['expert']:,} in an expert")
    report.fact("dtype", _dtype(config))
    return top_k


def _dtype(config: Any) -> str:
    return str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")


def _is_dense(config: Any) -> bool:
    return config.model_type in DENSE


def _check_memory(config: Any) -> None:
    needed = sum(p.numel() for p in _on_meta(config).parameters()) * _BYTES_PER_PARAMETER + _SLACK
    free = available_bytes()
    if needed > free:
        raise DoctorError(
            f"comparing this model takes {needed / 2**30:.1f} GiB of memory (fp32 weights and two sets of gradients), "
            f"{free / 2**30:.1f} GiB are available; free some, use a larger machine, or give --files-only"
        )


def _report_layout(recipe: Recipe, report: Report) -> None:
    parallel = recipe.parallel
    layout, device = Layout(parallel.workers, parallel.ep), choose_device(parallel.device, 0)
    dtype = str(training_dtype(recipe, device)).removeprefix("torch.")
    report.fact("recipe", f"{layout.world} workers on {device.type}, ep {layout.ep}, ZeRO {parallel.zero}, {dtype}")
    if "MoE layers" not in report.facts:
        return
    link = "gloo" if device.type == "cpu" else "NCCL"
    count, top_k = (int(part.split()[0]) for part in str(report.facts["MoE layers"]).split(", ")[1:])
    exchange = choose_dispatch(parallel.dispatch, recipe.routing.choices(top_k), layout.ep)
    over = f" over {link}" if layout.ep > 1 else ""
    report.fact("dispatch", f"{exchange.name}{over}: {exchange.reason}")
    parts = [layout.local_experts(rank, count) for rank in range(layout.ep)]
    report.fact(
        "experts of worker", [f"{rank} (mod {layout.ep}): {p.start}..{p.stop - 1}" for rank, p in enumerate(parts)]
    )
