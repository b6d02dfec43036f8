"""Checks of a recipe: the model as it would train it, in one process, and what the optimizer would step."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora.errors import AdapterError
from lora.watch import AdapterWatch
from trainer.build import build_model
from trainer.doctor_files import digests
from trainer.doctor_model import check_gradients
from trainer.doctor_passes import Named, random_tokens, run_pass
from trainer.doctor_report import Report
from trainer.engine import parameter_groups
from trainer.rendezvous import Process
from trainer.schema import Recipe


def check_training(recipe: Recipe, vocab_size: int, loaded: Mapping[str, str], report: Report) -> None:
    """Build the recipe's model, adapters attached; look for trainable parameters that nothing would move.

    ``loaded`` are :func:`~trainer.doctor_files.digests` of the folder's model as transformers loads it, if it has one.
    """
    alone = dataclasses.replace(recipe.parallel, workers=1, ep=1, dtype="fp32", device="cpu")
    # What the recipe names may need a GPU; here it is a CPU that looks.
    section = dataclasses.replace(recipe.model, experts_backend="auto")
    # Tenants have the recipe's banks each: one of them stands for all.
    recipe = dataclasses.replace(recipe, parallel=alone, model=section, tenants={})
    model, blocks = build_model(recipe, Process(0, 1, 0, torch.device("cpu")), vocab_size)
    if loaded:
        check_loading(model.named_parameters(), loaded, report)
    trained: Named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    report.fact("trains", f"{sum(p.numel() for _, p in trained):,} parameters; {frozen:,} are frozen")
    check_groups(trained, parameter_groups(model, recipe.train.weight_decay), report)
    watch = AdapterWatch(model) if recipe.adapter else None
    config: Any = model.config
    if blocks:
        ids_BS = random_tokens(config, blocks[0].experts.num_experts, int(config.num_experts_per_tok))
    else:  # blocks that do not route
        ids_BS = random_tokens(config, 1, 1)
    got = run_pass(model, blocks, trained, ids_BS, training=True)
    if watch is None:
        check_gradients(got, blocks, trained, report)
    else:
        _check_adapters(watch, report)


def check_loading(named: Iterable[tuple[str, Tensor]], loaded: Mapping[str, str], report: Report) -> None:
    """Our loader must give what transformers' does, bit for bit. Tensors that an adapter has renamed are left out."""
    ours = digests(named)
    for place in sorted(loaded.keys() & ours.keys()):
        if ours[place] != loaded[place]:
            report.failed(
                "loading", place, "is not what transformers loads", "do not train this; load the folder again"
            )
    count = len(loaded.keys() & ours.keys())
    report.passed("loading", f"{count} of {len(loaded)} tensors are what transformers loads, bit for bit")


def check_groups(trained: Named, groups: list[dict[str, Any]], report: Report) -> None:
    """Every trainable parameter must be in exactly one group of the optimizer."""
    held: Counter[nn.Parameter] = Counter(p for group in groups for p in group["params"])
    for name, parameter in trained:
        if held[parameter] != 1:
            report.failed(
                "optimizer", name, f"requires a gradient and is in {held[parameter]} of the optimizer's groups",
                "it would not be stepped, or twice; see trainer.engine.parameter_groups",
            )  # fmt: skip
    report.passed("optimizer", f"{len(trained)} trainable tensors are in one group each")


def _check_adapters(watch: AdapterWatch, report: Report) -> None:
    try:
        waiting = watch.check()
    except AdapterError as error:
        report.failed("adapters", "", str(error), "they would never train")
    else:
        seen = f"; no token reached {', '.join(waiting)}" if waiting else ""
        report.passed("adapters", f"every adapter that saw tokens got a gradient{seen}")
