"""Make a new model from sizes. Always transformers' own classes.

The same seed gives the same weights on every rank, so a rank's share of the experts is a slice of one model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from moe.families import FamilyError
from moe.family_table import FAMILIES, configuration, known_families


def new_config(family: str, fields: Mapping[str, Any], *, vocab_size: int) -> PreTrainedConfig:
    """A transformers configuration of ``family`` from recipe keys; keys that are None take the table's default.

    Raises FamilyError for an unknown family, for a key the family does not have (transformers would ignore it
    silently), for a missing one, and for sizes that transformers refuses.
    """
    if family not in FAMILIES:
        raise FamilyError(f"no family {family!r}; planaria has {known_families()}")
    given = {name: value for name, value in fields.items() if value is not None}
    unknown = [name for name in given if name not in FAMILIES[family].fields]
    if unknown:
        raise FamilyError(f"{family} has no {', '.join(unknown)}; it has {', '.join(FAMILIES[family].fields)}")
    missing = [name for name in FAMILIES[family].required if name not in given]
    if missing:
        raise FamilyError(f"{family} needs {', '.join(missing)}")
    # A family's default special tokens belong to its own vocabulary, not to ours.
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    try:
        return AutoConfig.for_model(family, vocab_size=vocab_size, **tokens, **configuration(family, given))
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise FamilyError(f"transformers refuses this {family}: {error}") from error


def new_model(
    family: str, fields: Mapping[str, Any], *, vocab_size: int, seed: int, dtype: torch.dtype
) -> PreTrainedModel:
    """A freshly initialised model; see :func:`new_config`. The seed alone decides the weights, on every rank."""
    config = new_config(family, fields, vocab_size=vocab_size)
    attention = FAMILIES[family].attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    return in_dtype(model, dtype)


def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Cast parameters, in place. Buffers stay: rotary frequencies and DeepSeek-V3's correction bias are fp32 always."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model
