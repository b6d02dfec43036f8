"""From a recipe to a model ready for DeepSpeed: built, its seams swapped, adapters attached, on its device."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import masking_utils

from lora.attach import attach, format_table
from moe.build import load_model, new_model
from moe.convert import convert
from moe.families import MoEBlock
from moe.layout import Layout
from moe.overlap import set_exchange
from trainer.rendezvous import Process
from trainer.schema import Recipe


def build_model(recipe: Recipe, process: Process, vocab_size: int) -> tuple[nn.Module, list[MoEBlock]]:
    """This worker's share of the model. Rank 0 prints what trains and how the experts run."""
    dtype = training_dtype(recipe, process.device)
    section = recipe.model
    if section.path is not None:
        overrides = {"attention_dropout": section.attention_dropout}
        model = load_model(section.path, dtype=dtype, overrides=overrides)
    else:
        assert section.family is not None
        fields = shape_fields(recipe)
        model = new_model(section.family, fields, vocab_size=vocab_size, seed=recipe.train.seed, dtype=dtype)
    model.config.use_cache = False
    _assume_unpacked()
    layout = Layout(process.world, recipe.parallel.ep)
    blocks = convert(model, layout, process.rank)
    parallel, top_k = recipe.parallel, model.config.num_experts_per_tok
    exchange = set_exchange(blocks, top_k, dispatch=parallel.dispatch, overlap=parallel.overlap)
    if recipe.adapter:
        report = attach(model, recipe.adapter, blocks, layout_ep=layout.ep, seed=recipe.train.seed)
        if process.rank == 0:
            print(format_table(report), flush=True)
    model.to(process.device)
    if process.rank == 0:
        backend = blocks[0].experts.backend
        print(f"experts run as {backend.name}: {backend.reason}", flush=True)
        if layout.ep > 1:
            print(f"tokens travel by {exchange.name}: {exchange.reason}; overlap {parallel.overlap}", flush=True)
    return model, blocks


def _assume_unpacked() -> None:
    """Have transformers take for granted that no row of a batch holds several sequences: ours never do.

    Otherwise it looks for restarting position ids in every forward pass, and waits to read the answer from a GPU.
    """
    if hasattr(masking_utils, "find_packed_sequence_indices"):
        masking_utils.find_packed_sequence_indices = lambda position_ids: None


def shape_fields(recipe: Recipe) -> dict[str, Any]:
    """The model section's fields that transformers' configuration takes."""
    ours = {"family", "path", "router_aux_loss_coef"}
    return {name: value for name, value in vars(recipe.model).items() if name not in ours}


def training_dtype(recipe: Recipe, device: torch.device) -> torch.dtype:
    """``auto`` is fp32 on a CPU, where bf16 products are slow, and bf16 on a GPU."""
    name = recipe.parallel.dtype
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
