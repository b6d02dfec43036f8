"""What a run computes with its weights, in words that can be kept and compared: nothing of it shows in their shapes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from moe.build import new_config
from moe.load import read_config
from trainer.build import shape_fields
from trainer.schema import Recipe

# Fields of a configuration that change no result, or that decide only what a new model begins with or its loss.
_WITHOUT_EFFECT = {
    "transformers_version", "_name_or_path", "architectures", "dtype", "vocab_size", "initializer_range", "use_cache",
    "return_dict", "problem_type", "id2label", "label2id", "chunk_size_feed_forward", "is_encoder_decoder",
    "output_hidden_states", "output_attentions", "output_router_logits", "router_aux_loss_coef", "bos_token_id",
    "eos_token_id", "pad_token_id", "max_position_embeddings",
}  # fmt: skip


def computed(recipe: Recipe) -> dict[str, Any]:
    """The model's configuration, the recipe's routing and its adapters, as JSON has them."""
    if recipe.model.path is not None:
        config = read_config(recipe.model.path)
    else:
        assert recipe.model.family is not None
        vocabulary = max(1, recipe.data.tokenizer.vocab_size)
        config = new_config(recipe.model.family, shape_fields(recipe), vocab_size=vocabulary)
    found: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        if name not in _WITHOUT_EFFECT:
            found |= {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
    found |= {f"routing.{key}": value for key, value in asdict(recipe.routing).items() if key != "force"}
    for name, bank in recipe.adapter.items():
        found |= {f"adapter.{name}.{key}": value for key, value in asdict(bank).items()}
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plain


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What was computed otherwise, a line for each field that both name."""
    return [
        f"{name}: {before[name]!r} in the checkpoint, {now[name]!r} here"
        for name in sorted(before.keys() & now.keys())
        if before[name] != now[name]
    ]
