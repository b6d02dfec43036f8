"""A transformers model with everything but its routed experts: those never exist as parameters here."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from inference.cache import ExpertCache
from inference.errors import InferenceError
from inference.executor import Executor
from inference.expert_block import ExpertShape
from inference.experts import OffloadedExperts
from inference.gates import hasten
from inference.store import FLOAT_DTYPES, TensorFiles, stored_names
from moe.convert import form_of
from moe.families import FamilyError, MoEBlock, find_moe_blocks
from moe.family_table import DENSE
from moe.quantised import quantisation


def build_skeleton(folder: Path, dtype: torch.dtype | None) -> tuple[nn.Module, list[MoEBlock]]:
    """The model of ``folder/config.json`` with all parameters on the meta device, and its MoE blocks.

    A model of a dense family that adapters train on has none. ``dtype`` None takes the folder's own. Raises
    InferenceError if the config cannot be read or is of neither kind.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # transformers' own checks raise all kinds
        raise InferenceError(f"{folder}: transformers cannot read config.json here: {error}") from error
    if why := quantisation(folder, config.to_dict()):
        raise InferenceError(why)
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    if not isinstance(dtype, torch.dtype):
        raise InferenceError(f"{folder}: config.json says dtype {dtype!r}, which torch does not know; mend it")
    with init_empty_weights():
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        except Exception as error:  # a KeyError for an activation without a name, and others
            why = f"{type(error).__name__}: {error}"
            raise InferenceError(f"{folder}: config.json is not of a language model to be built: {why}") from error
    if config.model_type in DENSE:
        return model.eval(), []
    try:
        return model.eval(), find_moe_blocks(model)
    except FamilyError as error:
        raise InferenceError(f"{folder}: {error}") from error


def expert_shape(folder: Path, blocks: list[MoEBlock]) -> ExpertShape:
    """The sizes all experts share. Raises InferenceError for layouts that the offloaded experts do not compute."""
    shapes = set()
    for block in blocks:
        experts = block.experts
        where = f"{folder}: {block.path}.experts ({type(experts).__name__})"
        try:
            form = form_of(experts, where)
        except FamilyError as error:
            raise InferenceError(str(error)) from error
        num_experts, *sizes = experts.down_proj.shape
        hidden, intermediate = reversed(sizes) if form.transposed else sizes
        biased = getattr(experts, "gate_up_proj_bias", None) is not None
        shapes.add(ExpertShape(num_experts, hidden, intermediate, form, biased))
    if len(shapes) != 1:
        raise InferenceError(
            f"{folder}: layers with experts of different sizes are not served yet: {sorted(map(str, shapes))}"
        )
    return shapes.pop()


def offload_experts(blocks: list[MoEBlock], cache: ExpertCache, executor: Executor | None = None) -> None:
    """Puts experts that borrow from ``cache`` in place of the skeleton's own; ``executor`` brings them over a link.

    Gates of known kinds are hastened: they make the same choice, up to ties and rounding.
    """
    for block in blocks:
        hasten(block.gate, cache.blocks_CB.device)
        block.module.experts = OffloadedExperts(cache, block.layer, activation(block), executor)


def activation(block: MoEBlock) -> Callable[[torch.Tensor], torch.Tensor]:
    """Of the gate, where the experts' form does not say more."""
    return getattr(block.experts, "act_fn", nn.functional.silu)


def load_dense(model: nn.Module, files: TensorFiles, device: torch.device) -> None:
    """Loads every parameter and persistent buffer that is left, each in the skeleton's own dtype.

    Raises InferenceError naming the tensors that are missing or misshapen, and the file.
    """
    missing = []
    for name, empty in model.state_dict(keep_vars=True).items():
        stored = next((n for n in stored_names(name) if n in files), None)
        if stored is None:
            missing.append(name)
            continue
        shape, stored_as = files.describe(stored)
        if shape != tuple(empty.shape):
            raise InferenceError(
                f"tensor {stored} in {files.file(stored)} has shape {list(shape)}, but config.json asks for "
                f"{list(empty.shape)}; the folder mixes two models: export it again"
            )
        if empty.dtype.is_floating_point and stored_as not in FLOAT_DTYPES:
            raise InferenceError(
                f"tensor {stored} in {files.file(stored)} is {stored_as}; only {', '.join(FLOAT_DTYPES)} are served: "
                "save the model unquantised"
            )
        _replace(model, name, files.view(stored).to(device=device, dtype=empty.dtype, copy=True))
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if model.config.tie_word_embeddings and head is not None:
        head.weight = embeddings.weight
    still_empty = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    absent = [name for name in missing if name in still_empty or name in dict(model.named_buffers())]
    if absent:
        raise InferenceError(
            f"{files.folder}: {len(absent)} tensors are missing, the first is {absent[0]}; either the copy is "
            "incomplete (export it again), or this family's files name their tensors in a way not served yet"
        )
    model.to(device)


def check_surplus(model: nn.Module, files: TensorFiles, experts: Collection[str]) -> None:
    """Raises InferenceError for tensors that neither the model nor its ``experts`` have a place for: they would be left
    out without a word.

    Files may hold what transformers ignores: layers that predict later tokens, behind the others, and the frequencies
    of rotation that older versions saved.
    """
    config: Any = model.config
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    ignored.append(re.compile(r"\.rotary_emb\.inv_freq$"))
    layers = config.num_hidden_layers
    behind = range(layers, layers + (getattr(config, "num_nextn_predict_layers", None) or 0))
    known = {next((n for n in stored_names(name) if n in files), name) for name in model.state_dict()}
    surplus = []
    for name in sorted(files.names - known - set(experts)):
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if not ((layer and int(layer[1]) in behind) or any(pattern.search(name) for pattern in ignored)):
            surplus.append(name)
    if surplus:
        more = f" and {len(surplus) - 1} more" if len(surplus) > 1 else ""
        raise InferenceError(
            f"{files.file(surplus[0])} holds {surplus[0]}{more}, and the model of config.json, with "
            f"num_hidden_layers={layers}, has no place for it; the folder mixes two models: export it again"
        )


def share_dense(model: nn.Module, loaded: nn.Module) -> None:
    """Gives a second skeleton of the same folder the very tensors of the first, which :func:`load_dense` loaded."""
    for name, tensor in loaded.state_dict(keep_vars=True).items():
        _replace(model, name, tensor.detach())
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if model.config.tie_word_embeddings and head is not None:
        head.weight = embeddings.weight


def _replace(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
    else:
        setattr(module, leaf, tensor)
