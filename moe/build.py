"""Make a model: new from sizes, or from a Hugging Face folder. Always transformers' own classes.

The same seed gives the same weights on every rank, so a rank's share of the experts is a slice of one model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from moe.families import FamilyError


def new_model(
    family: str, fields: Mapping[str, Any], *, vocab_size: int, seed: int, dtype: torch.dtype
) -> PreTrainedModel:
    """A freshly initialised model of ``family`` with transformers' own field names.

    Raises FamilyError for a field that the family's configuration does not have, since transformers would ignore it silently.
    """
    known = AutoConfig.for_model(family)
    unknown = [name for name in fields if not hasattr(known, name) and name not in {"rope_theta", "head_dim"}]
    if unknown:
        raise FamilyError(
            f"{family} has no configuration field {', '.join(unknown)}; see transformers' {type(known).__name__}"
        )
    fields = dict(fields)
    rope_theta = fields.pop("rope_theta", None)
    if rope_theta is not None:
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": rope_theta}
    config = AutoConfig.for_model(family, vocab_size=vocab_size, **fields)
    config.dtype = dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
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
    return AutoModelForCausalLM.from_pretrained(folder, config=config, attn_implementation="sdpa", dtype=dtype)
