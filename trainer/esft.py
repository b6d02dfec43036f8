"""`planaria esft select R OUT.json`: which experts to train on a recipe's data (ESFT, arXiv 2407.01906, section 3).

The base model reads a sample of the recipe's training rows. An expert's score in its layer is its share of the tokens'
choices (``token``) or of their weights (``gate``).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from moe.context import BatchContext, batch_context, current
from moe.families import MoEBlock
from moe.selected import select
from trainer import data as data_module
from trainer.batches import make_batch
from trainer.build import build_model
from trainer.esft_file import SelectionError, write_selection
from trainer.recipe import load_recipe
from trainer.rendezvous import Process
from trainer.schema import Recipe

TOKENS = 131_072  # of the authors' sample


def main(recipe_path: str, overrides: list[str], out: str, score: str, p: float, tokens: int) -> int:
    """Write the selection to ``out``; returns the exit status."""
    recipe = load_recipe(recipe_path, overrides)
    if recipe.model.path is None:
        raise SelectionError(f"{recipe_path}: experts are selected in a trained model; give model.path")
    if not 0 < p <= 1:
        raise SelectionError(f"--p {p} is a share of the choices; give a number above 0 and at most 1")
    seen, shares = score_experts(recipe, score, tokens)
    chosen = {layer: select(found, p) for layer, found in shares.items()}
    write_selection(out, {"model": recipe.model.path, "score": score, "p": p, "tokens": seen}, chosen)
    counts = [len(experts) for experts in chosen.values()]
    total = sum(len(found) for found in shares.values())
    print(
        f"{out}: {sum(counts)} of {total} experts in {len(counts)} layers, {min(counts)} to {max(counts)} a layer, by "
        f"{score} scores of {seen:,} tokens; train them with model.trainable_experts={out}"
    )
    return 0


def score_experts(recipe: Recipe, score: str, tokens: int) -> tuple[int, dict[int, list[float]]]:
    """How many tokens were read, and by layer the scores of all experts. In one process."""
    data = data_module.load(recipe)
    alone = dataclasses.replace(recipe.parallel, workers=1, ep=1)
    section = dataclasses.replace(recipe.model, trainable_experts=None, experts_backend="auto")
    alone_recipe = dataclasses.replace(recipe, parallel=alone, model=section, adapter={})
    device = torch.device("cuda" if recipe.parallel.device == "cuda" and torch.cuda.is_available() else "cpu")
    model, blocks = build_model(alone_recipe, Process(0, 1, 0, device), data.vocab_size)
    sums = {block.layer: torch.zeros(block.experts.num_experts, dtype=torch.float64) for block in blocks}
    hooks = [
        block.experts.register_forward_pre_hook(_counter(block, sums, score), with_kwargs=True) for block in blocks
    ]
    length = recipe.data.sequence_length
    rows = max(1, min(len(data.train), -(-tokens // length)))
    model.eval()
    seen = 0
    try:
        for i in range(rows):
            index = data_module.sample_order(i, len(data.train), recipe.train.seed)
            batch = make_batch([data.train[index]], device, 1.0)
            mask_T = batch.facts.get("mask_T")
            seen += length if mask_T is None else int(mask_T.sum())
            with torch.no_grad(), batch_context(BatchContext(balance=False, **batch.facts)):
                model(**batch.inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen, {layer: found.tolist() for layer, found in sums.items()}


def _counter(block: MoEBlock, sums: dict[int, torch.Tensor], score: str) -> Any:
    def count(_module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        given = dict(zip(("hidden_states", "top_k_index", "top_k_weights"), args, strict=False)) | kwargs
        weights_TK = given["top_k_weights"].double() if score == "gate" else torch.ones_like(given["top_k_index"])
        if current().mask_T is not None:  # padding
            weights_TK = weights_TK * current().mask_T[:, None]
        index, experts = given["top_k_index"].flatten().cpu(), sums[block.layer].numel()
        sums[block.layer] += torch.bincount(index, weights_TK.flatten().double().cpu(), experts)

    return count
