"""A model as a Hugging Face folder, under the names and in the layout that its family's files have."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from moe.families import FamilyError
from moe.load import empty_model, read_buffers


def whole_model(
    config: PreTrainedConfig, tensors: Mapping[str, Tensor], base: str | Path | None = None
) -> PreTrainedModel:
    """A model with these parameters, by path, experts stacked and complete; nothing is copied.

    Args:
        tensors: every parameter, and those buffers that have changed.
        base: folder from which the other persistent buffers come; without one they are as in a new model.
    Raises FamilyError if a parameter is missing, misshapen or not the model's.
    """
    dtype = next(iter(tensors.values())).dtype
    model = empty_model(config, dtype=dtype)
    if base is not None:
        read_buffers(model, base)
    buffers = {name for name, _ in model.named_buffers()}
    names = {name for name, _ in model.named_parameters()}
    if problem := sorted((names - set(tensors)) | (set(tensors) - names - buffers)):
        raise FamilyError(f"the tensors are not those of this {config.model_type} model: {', '.join(problem[:5])}")
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        old = getattr(module, leaf)
        if old.shape != tensor.shape:
            raise FamilyError(f"{name} has shape {list(tensor.shape)}, the model has {list(old.shape)}")
        if name in buffers:
            old.copy_(tensor)
        else:
            setattr(module, leaf, torch.nn.Parameter(tensor, requires_grad=False))
    model.tie_weights()
    return model


def write_folder(model: PreTrainedModel, out: str | Path) -> None:
    """With transformers' own ``save_pretrained``, which knows each family's files."""
    disable_progress_bar()
    # transformers imports DeepSpeed on the way, which otherwise goes looking for accelerators and says so.
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    model.save_pretrained(out)
