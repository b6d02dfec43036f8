"""Make a model: new from sizes, or from a Hugging Face folder. Always transformers' own classes.

The same seed gives the same weights on every rank, so a rank's share of the experts is a slice of one model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from moe.families import FamilyError


def new_config(family: str, fields: Mapping[str, Any], *, vocab_size: int) -> PreTrainedConfig:
    """A configuration of ``family`` with transformers' own field names; fields that are None keep the family's default.

    Raises FamilyError for a field the family does not have: transformers would ignore it silently.
    """
    fields = {name: value for name, value in fields.items() if value is not None}
    rope_theta = fields.pop("rope_theta", None)
    known = AutoConfig.for_model(family)
    # Some families read head_dim from a configuration that does not declare it.
    unknown = [name for name in fields if not hasattr(known, name) and name != "head_dim"]
    if unknown:
        raise FamilyError(f"{family} has no field {', '.join(unknown)}; see transformers' {type(known).__name__}")
    if rope_theta is not None:
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": rope_theta}
    # A family's default special tokens belong to its own vocabulary, not to ours.
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return AutoConfig.for_model(family, vocab_size=vocab_size, **tokens, **fields)


def new_model(
    family: str, fields: Mapping[str, Any], *, vocab_size: int, seed: int, dtype: torch.dtype
) -> PreTrainedModel:
    """A freshly initialised model; see :func:`new_config`. The seed alone decides the weights, on every rank."""
    config = new_config(family, fields, vocab_size=vocab_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    model.config.dtype = dtype
    return model.to(dtype)


def load_model(path: str | Path, *, dtype: torch.dtype, overrides: Mapping[str, Any]) -> PreTrainedModel:
    """The model in a Hugging Face folder, with configuration ``overrides`` such as dropout.

    Raises FamilyError if the folder has no model.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise FamilyError(
            f"{folder} has no config.json; give a Hugging Face model folder, e.g. one written by `planaria export`"
        )
    config = AutoConfig.from_pretrained(folder)
    for name, value in overrides.items():
        setattr(config, name, value)
    disable_progress_bar()  # several workers' bars would garble the log
    return AutoModelForCausalLM.from_pretrained(folder, config=config, attn_implementation="sdpa", dtype=dtype)
