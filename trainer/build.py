"""From a recipe to a model ready for DeepSpeed: built, its seams swapped, adapters attached, on its device."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lora.attach import attach, format_table
from lora.presets import expansions
from lora.tenants import Tenant, attach_tenants
from lora.trained import fill as fill_experts
from moe.build import new_model
from moe.convert import assign_addresses, convert
from moe.extend import freeze_experts
from moe.families import MoEBlock
from moe.family_table import FAMILIES
from moe.fingerprint import fingerprint
from moe.kernels.grouped import Backend
from moe.layout import Layout
from moe.load import empty_model, fill
from moe.merging import MergedExperts
from moe.mtp import attach_mtp
from moe.norms import fuse_norms
from moe.overlap import set_exchange
from moe.rotary import fuse_rotary
from moe.selected import train_experts
from moe.soft import SoftMoE, replace_blocks
from trainer.dense_rules import dense_problem, is_dense
from trainer.esft_file import read_selection
from trainer.plan import PlanError
from trainer.rendezvous import Process
from trainer.sample_borders import check_attention, respect_borders
from trainer.schema import Recipe


def build_model(recipe: Recipe, process: Process, vocab_size: int) -> tuple[nn.Module, list[MoEBlock]]:
    """This worker's share of the model. Rank 0 prints what trains and how the experts run."""
    model, blocks = _built(recipe, process, vocab_size)
    if process.device.type == "cuda":
        fuse_norms(model)
        fuse_rotary(model)
    return model, blocks


def _built(recipe: Recipe, process: Process, vocab_size: int) -> tuple[nn.Module, list[MoEBlock]]:
    dtype = training_dtype(recipe, process.device)
    section = recipe.model
    if section.path is not None:
        overrides = {"attention_dropout": section.attention_dropout}
        model = empty_model(section.path, dtype=dtype, overrides=overrides)
    else:
        assert section.family is not None
        fields = shape_fields(recipe)
        model = new_model(section.family, fields, vocab_size=vocab_size, seed=recipe.train.seed, dtype=dtype)
    model.config.use_cache = False
    respect_borders()
    if recipe.data.format == "chat":
        check_attention(model.config)
    layout = Layout(process.world, recipe.parallel.ep)
    if is_dense(model.config.model_type):
        return _adapted_dense(model, recipe, process), []
    blocks = convert(model, layout, process.rank)
    if section.path is not None:
        fill(model, section.path)
    if recipe.model.soft.kind != "none":
        return _softened(model, blocks, recipe, process), []
    if recipe.model.frozen_experts:
        freeze_experts(model, blocks, recipe.model.frozen_experts)
    if recipe.model.trainable_experts:
        train_experts(model, blocks, read_selection(recipe.model.trainable_experts))
    mtp = recipe.train.mtp
    if mtp.depth:
        blocks += attach_mtp(model, mtp.depth, mtp.weight, seed=recipe.train.seed, layout=layout, rank=process.rank)
    parallel, top_k = recipe.parallel, recipe.routing.choices(model.config.num_experts_per_tok)
    if recipe.routing.method == "expert_choice":
        top_k = blocks[0].experts.num_experts  # all of them are listed for every token
    exchange = set_exchange(blocks, top_k, dispatch=parallel.dispatch, overlap=parallel.overlap)
    if recipe.adapter:
        _adapt(model, recipe, process, blocks, layout.ep)
    model.to(process.device)
    for line in _settle_backends(blocks, section.experts_backend):
        if process.rank == 0:
            print(line, flush=True)
    if process.rank == 0 and layout.ep > 1:
        print(f"tokens travel by {exchange.name}: {exchange.reason}; overlap {parallel.overlap}", flush=True)
    return model, blocks


def _adapted_dense(model: nn.Module, recipe: Recipe, process: Process) -> nn.Module:
    """A dense base with its adapters. Raises PlanError if the recipe wants anything of it that needs experts."""
    if problem := dense_problem(recipe, model.config.model_type):
        raise PlanError(problem)
    assign_addresses(model)
    fill(model, recipe.model.path)
    _adapt(model, recipe, process, [])
    return model.to(process.device)


def _adapt(model: nn.Module, recipe: Recipe, process: Process, blocks: list[MoEBlock], ep: int = 1) -> None:
    """Attach the banks; rank 0 prints each in full, and where it went."""
    if recipe.tenants:
        report = attach_tenants(model, recipe.adapter, slots_of(recipe), blocks)
    else:
        report = attach(model, recipe.adapter, blocks, layout_ep=ep, seed=recipe.train.seed)
        if any(bank.adapters for bank in recipe.adapter.values()):
            # Rank 0 reads the base, to see that the adapters are its own.
            base = recipe.model.path if process.rank == 0 else None
            fill_experts(model, recipe.adapter, fingerprint(base) if base else None)
    if process.rank == 0:
        print("\n".join([*expansions(recipe.adapter), format_table(report)]), flush=True)


def _softened(model: nn.Module, blocks: list[MoEBlock], recipe: Recipe, process: Process) -> nn.Module:
    """The model with soft blocks in place of its MoE blocks."""
    soft, seed = recipe.model.soft, recipe.train.seed
    if soft.kind == "soft_moe":
        made = replace_blocks(model, blocks, lambda block: SoftMoE(block, soft.slots, seed))
        what = f"Soft MoE with {soft.slots} slots for each expert"
    else:
        made = replace_blocks(model, blocks, lambda block: MergedExperts(block, soft.segment))
        what = f"experts merged for {f'{soft.segment} positions at once' if soft.segment else 'whole sequences'}"
    if process.rank == 0:
        print(f"{len(made)} MoE blocks replaced: {what}; `planaria export` cannot write this model", flush=True)
    return model.to(process.device)


def _settle_backends(blocks: list[MoEBlock], wanted: str) -> list[str]:
    """Choose how each layer's experts run; one line for all layers that run alike. Raises BackendError."""
    layers: dict[Backend, list[str]] = {}
    for block in blocks:
        block.experts.wanted_backend = wanted
        layers.setdefault(block.experts.backend, []).append(str(block.layer))
    where = [f" of layers {', '.join(found)}" if len(layers) > 1 else "" for found in layers.values()]
    return [f"experts{at} run as {b.name}: {b.reason}" for b, at in zip(layers, where, strict=True)]


def shape_fields(recipe: Recipe) -> dict[str, Any]:
    """The model section's keys that are of its family's shape, for :func:`moe.build.new_config`."""
    assert recipe.model.family is not None
    return {name: getattr(recipe.model, name) for name in FAMILIES[recipe.model.family].fields}


def slots_of(recipe: Recipe) -> list[Tenant]:
    """The recipe's tenants in the order of their slots."""
    return [Tenant(name, own.seed or 0) for name, own in recipe.tenants.items()]


def training_dtype(recipe: Recipe, device: torch.device) -> torch.dtype:
    """``auto`` is fp32 on a CPU, where bf16 products are slow, and bf16 on a GPU."""
    name = recipe.parallel.dtype
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
