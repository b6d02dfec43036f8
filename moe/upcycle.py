"""Dense -> mixture of experts: a Hugging Face folder whose every feed-forward block has become experts.

Sparse upcycling (Komatsuzaki et al. 2022) makes each expert a copy of the dense block. Fine-grained upcycling (He et
al. 2024, "Upcycling Large Language Models into Mixture of Experts") first cuts the block's width into G parts; the
parts of one copy are a *virtual group*, and all of its router rows begin equal, so that top-k takes whole groups. Its
experts' weights in the sum are renormalised, hence a G-th each: ``down_proj`` is multiplied by G, and the new model
computes what the dense one did. (That paper spreads its factor over all three matrices, exact only without the SiLU.)

The source is read, and the result written, one tensor at a time.

Shapes: H hidden, I the dense block's width, E = C copies x G parts experts.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from moe.folder import copy_companions, new_folder, read_tensors, write_tensors

# A router of zeros would send every token to the first experts: the smallest logits that tell experts apart.
TIE_BREAKING_STD = 1e-6

_MLP = re.compile(r"(model\.layers\.(\d+)\.)mlp\.(.+)")
_PROJECTIONS = {"gate_proj.weight": 0, "up_proj.weight": 0, "down_proj.weight": 1}  # the axis of width I


class UpcycleError(ValueError):
    """The dense model cannot become a mixture of experts as asked; the message says why and what to do."""


@dataclass(frozen=True)
class Upcycling:
    """How. Raises UpcycleError for numbers that contradict each other.

    Attributes:
        copies: of the dense block in every layer; ``copies * parts`` experts.
        parts: how many experts one copy is cut into.
        top_groups: copies that a token is sent to; it chooses ``top_groups * parts`` experts.
        noise: standard deviation, relative to each tensor's own, of what is added to all copies but the first.
        router_std: of the router's weights; 0 means almost equal logits, which noise of TIE_BREAKING_STD tells apart.
        seed: of both.
    """

    copies: int = 8
    parts: int = 1
    top_groups: int = 2
    noise: float = 0.0
    router_std: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        if self.copies < 1 or self.parts < 1:
            raise UpcycleError(f"copies={self.copies} and parts={self.parts} must be at least 1; change them")
        if not 1 <= self.top_groups <= self.copies:
            raise UpcycleError(f"top_groups={self.top_groups} must be 1 to copies={self.copies}; change it")
        if not (0 <= self.noise < math.inf and 0 <= self.router_std < math.inf):
            raise UpcycleError("noise and router_std are standard deviations; give a number, 0 or more")

    @property
    def num_experts(self) -> int:
        return self.copies * self.parts

    @property
    def top_k(self) -> int:
        return self.top_groups * self.parts


@dataclass(frozen=True)
class _Target:
    """A family's configuration and names on disk."""

    model_type: str
    architecture: str
    gate: str
    expert: str
    projections: tuple[str, str, str]  # of gate, up, down


_QWEN = ("mlp.gate.weight", "mlp.experts.{}.{}.weight", ("gate_proj", "up_proj", "down_proj"))
_MIXTRAL = _Target(
    "mixtral",
    "MixtralForCausalLM",
    "block_sparse_moe.gate.weight",
    "block_sparse_moe.experts.{}.{}.weight",
    ("w1", "w3", "w2"),
)
TARGETS = {
    "llama": _MIXTRAL,
    "mistral": _MIXTRAL,
    "qwen2": _Target("qwen2_moe", "Qwen2MoeForCausalLM", *_QWEN),
    "qwen3": _Target("qwen3_moe", "Qwen3MoeForCausalLM", *_QWEN),
}
_SHARED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "tie_word_embeddings",
    "rope_parameters", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


def upcycle(dense: str | Path, out: str | Path, how: Upcycling) -> PreTrainedConfig:
    """Write the mixture of experts to ``out``, a folder that transformers loads; returns its configuration.

    Raises UpcycleError for a model that does not fit, FolderError if ``out`` exists or ``dense`` has no weights.
    """
    dense, out = Path(dense), Path(out)
    if not (dense / "config.json").is_file():
        raise UpcycleError(f"{dense} has no config.json; give a Hugging Face folder of a dense model")
    source = AutoConfig.from_pretrained(dense)
    config = target_config(source, how)
    target = TARGETS[source.model_type]
    with new_folder(out) as temporary:
        tensors = read_tensors(dense)
        write_tensors(_converted(tensors, config, target, how), temporary)
        config.save_pretrained(temporary)
        copy_companions(dense, temporary)
    return config


def target_config(source: PreTrainedConfig, how: Upcycling) -> PreTrainedConfig:
    """The mixture's configuration. Raises UpcycleError for what its family cannot express."""
    target = TARGETS.get(source.model_type)
    if target is None:
        raise UpcycleError(
            f"model_type {source.model_type!r} cannot be upcycled; {', '.join(TARGETS)} can: use one of them"
        )
    width, parts = source.intermediate_size, how.parts
    if width % parts:
        raise UpcycleError(f"parts={parts} does not divide the intermediate size {width}; choose a divisor")
    fields: dict[str, Any] = {
        name: getattr(source, name) for name in _SHARED if getattr(source, name, None) is not None
    }
    fields |= {"num_experts_per_tok": how.top_k, "dtype": source.dtype, "architectures": [target.architecture]}
    if target is _MIXTRAL:
        for name in ("attention_bias", "mlp_bias"):
            if getattr(source, name, False):
                raise UpcycleError(f"the dense model has {name}, which mixtral has not; it cannot be expressed")
        fields |= {"num_local_experts": how.num_experts, "intermediate_size": width // parts}
        fields["sliding_window"] = getattr(source, "sliding_window", None)
    else:
        if getattr(source, "use_sliding_window", False):
            raise UpcycleError(f"{target.model_type} places sliding windows in other layers; it cannot be expressed")
        fields |= {"num_experts": how.num_experts, "moe_intermediate_size": width // parts}
        fields |= {"intermediate_size": width, "norm_topk_prob": True}
        if source.model_type == "qwen3":
            fields["attention_bias"] = source.attention_bias
        else:
            fields["shared_expert_intermediate_size"] = width // parts
    return AutoConfig.for_model(target.model_type, **fields)


def _converted(
    tensors: Iterable[tuple[str, Tensor]], config: PreTrainedConfig, target: _Target, how: Upcycling
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the mixture, in the dense model's order. Raises UpcycleError for a tensor that is unknown
    or missing."""
    seen = set()
    dtype = torch.float32
    for name, tensor in tensors:
        match = _MLP.fullmatch(name)
        if match is None:
            yield name, tensor
            continue
        prefix, layer, projection = match[1], int(match[2]), match[3]
        if projection not in _PROJECTIONS:
            raise UpcycleError(f"the tensor {name} is unknown; the dense block must have {', '.join(_PROJECTIONS)}")
        seen.add((layer, projection))
        dtype = tensor.dtype
        yield from _experts(tensor, prefix, projection, target, how)
    wanted = {(layer, projection) for layer in range(config.num_hidden_layers) for projection in _PROJECTIONS}
    if seen != wanted:
        layer, projection = min(seen ^ wanted)
        raise UpcycleError(f"model.layers.{layer}.mlp.{projection} is not where config.json wants it; check the folder")
    for layer in range(config.num_hidden_layers):
        yield from _router(f"model.layers.{layer}.", config, target, how, dtype)


def _experts(
    dense: Tensor, prefix: str, projection: str, target: _Target, how: Upcycling
) -> Iterator[tuple[str, Tensor]]:
    """One dense matrix as every expert's share of it."""
    axis = _PROJECTIONS[projection]
    ours = target.projections[list(_PROJECTIONS).index(projection)]
    std = float(dense.float().std()) * how.noise
    for copy in range(how.copies):
        weight = dense
        if std and copy:
            added = drawn(dense.shape, std, how.seed, f"{prefix}{projection}.{copy}")
            weight = (dense.float() + added).to(dense.dtype)
        if projection == "down_proj.weight":
            weight = weight * how.parts
        for part, share in enumerate(weight.chunk(how.parts, axis)):
            yield prefix + target.expert.format(copy * how.parts + part, ours), share


def _router(
    prefix: str, config: PreTrainedConfig, target: _Target, how: Upcycling, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """A row for each expert, equal within a virtual group; and a shared expert that adds nothing yet, if there is one.

    qwen2_moe cannot be without a shared expert: its ``down_proj`` begins at zero, and trains.
    """
    hidden, name = config.hidden_size, prefix + target.gate
    rows_CH = drawn((how.copies, hidden), how.router_std or TIE_BREAKING_STD, how.seed, name)
    yield name, rows_CH.repeat_interleave(how.parts, 0).to(dtype)
    if target.model_type != "qwen2_moe":
        return
    width = config.shared_expert_intermediate_size
    for projection in ("gate_proj", "up_proj"):
        name = f"{prefix}mlp.shared_expert.{projection}.weight"
        yield name, drawn((width, hidden), config.initializer_range, how.seed, name).to(dtype)
    yield f"{prefix}mlp.shared_expert.down_proj.weight", torch.zeros(hidden, width, dtype=dtype)
    yield f"{prefix}mlp.shared_expert_gate.weight", torch.zeros(1, hidden, dtype=dtype)


def drawn(shape: Iterable[int], std: float, seed: int, name: str) -> Tensor:
    """fp32, a function of the seed and the tensor's name alone."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randn(tuple(shape), generator=generator) * std
