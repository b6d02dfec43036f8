"""The Hugging Face families that planaria builds, loads, trains and exports, as data (no torch here).

A recipe has one set of keys for the shape of a model; families call the same things by different names, and some have
parts that others lack. One entry of :data:`FAMILIES` says all that differs; what can be seen on transformers' modules
(:class:`~moe.form.ExpertForm`) is not repeated here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """One ``model_type`` of transformers.

    Attributes:
        fields: the configuration's name of each recipe key that the family has.
        required: the keys without which a new model has no shape.
        defaults: of keys that may be left out; None is a value of its own (no low rank, no window).
        expert_names: (gate, up, down) of one expert in safetensors files; None if experts are stacked there, too.
        block_on_disk: how files call a layer's ``mlp``.
        attention: transformers' implementation; gpt_oss's attention sinks exist in the eager one only.
        latent_attention: multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).
        group_scores: how many of a group's best scores rank it, with group-limited routing.
        attention_biases: which of q, k, v, o have one.
        buffers: last names of persistent buffers: in files and state dicts, but no parameters.
    """

    fields: Mapping[str, str]
    required: tuple[str, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    expert_names: tuple[str, str, str] | None = ("gate_proj", "up_proj", "down_proj")
    block_on_disk: str = "mlp"
    attention: str = "sdpa"
    latent_attention: bool = False
    group_scores: int = 0
    attention_biases: str = ""
    buffers: tuple[str, ...] = ()

    def lacks(self, key: str) -> bool:
        """Whether ``key`` is some family's, but not this one's."""
        return key in SHAPE_KEYS and key not in self.fields


def _same(*keys: str) -> dict[str, str]:
    return {key: key for key in keys}


_COMMON = _same(
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_experts_per_tok", "max_position_embeddings",
    "rope_theta", "attention_dropout", "initializer_range", "tie_word_embeddings",
)  # fmt: skip
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_experts_per_tok")
_EXPERT_SIZES = ("num_experts", "moe_intermediate_size")
_GROUPED = (*_SIZES, "num_key_value_heads", *_EXPERT_SIZES)

_DEEPSEEK = (
    "n_shared_experts", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"
)  # fmt: skip
_DEEPSEEK_FIELDS = {
    **_COMMON,
    **_same("moe_intermediate_size", "q_lora_rank", "n_group", "topk_group", "routed_scaling_factor"),
    **_same("first_k_dense_replace", "intermediate_size", *_DEEPSEEK),
    "num_experts": "n_routed_experts",
}
_DEEPSEEK_DEFAULTS = {
    "q_lora_rank": None, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "first_k_dense_replace": 0
}  # fmt: skip

FAMILIES: dict[str, Family] = {
    "mixtral": Family(
        {
            **_COMMON,
            **_same("num_key_value_heads", "head_dim", "sliding_window"),
            "num_experts": "num_local_experts",
            "moe_intermediate_size": "intermediate_size",
        },
        _GROUPED,
        {"sliding_window": None},
        expert_names=("w1", "w3", "w2"),
        block_on_disk="block_sparse_moe",
    ),
    "qwen2_moe": Family(
        {
            **_COMMON,
            **_same("num_key_value_heads", "head_dim", *_EXPERT_SIZES),
            **_same("shared_expert_intermediate_size", "norm_topk_prob"),
        },
        (*_GROUPED, "shared_expert_intermediate_size"),
        {"norm_topk_prob": True},
        attention_biases="qkv",
    ),
    "qwen3_moe": Family(
        {**_COMMON, **_same("num_key_value_heads", "head_dim", *_EXPERT_SIZES, "norm_topk_prob")},
        _GROUPED,
        {"norm_topk_prob": True},
    ),
    "olmoe": Family(
        {
            **_COMMON,
            **_same("num_key_value_heads", "num_experts", "norm_topk_prob"),
            "moe_intermediate_size": "intermediate_size",
        },
        _GROUPED,
        {"norm_topk_prob": True},
    ),
    "deepseek_v2": Family(
        _DEEPSEEK_FIELDS,
        (*_SIZES, *_EXPERT_SIZES, *_DEEPSEEK),
        _DEEPSEEK_DEFAULTS,
        latent_attention=True,
        group_scores=1,
    ),
    "deepseek_v3": Family(
        {**_DEEPSEEK_FIELDS, **_same("norm_topk_prob")},
        (*_SIZES, *_EXPERT_SIZES, *_DEEPSEEK),
        {**_DEEPSEEK_DEFAULTS, "norm_topk_prob": True},
        latent_attention=True,
        group_scores=2,
        buffers=("e_score_correction_bias",),
    ),
    "gpt_oss": Family(
        {
            **_COMMON,
            **_same("num_key_value_heads", "head_dim", "sliding_window"),
            "num_experts": "num_local_experts",
            "moe_intermediate_size": "intermediate_size",
        },
        _GROUPED,
        {"sliding_window": 128},
        expert_names=None,
        attention="eager",
        attention_biases="qkvo",
    ),
}

# Dense families: adapters train on them, and upcycling makes mixtures of them. Files name their tensors as modules do.
DENSE: dict[str, Family] = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), Family({}, (), expert_names=None))

SHAPE_KEYS = tuple(dict.fromkeys(key for family in FAMILIES.values() for key in family.fields))

BUFFERS = tuple(name for family in FAMILIES.values() for name in family.buffers)


def resolved(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of ``values`` that family ``name`` has, with its defaults for those that are None."""
    family = FAMILIES[name]
    known: dict[str, Any] = {key: values.get(key) for key in family.fields}
    known = {key: family.defaults.get(key) if value is None else value for key, value in known.items()}
    if "head_dim" in known and known["head_dim"] is None:
        known["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
    return known


def configuration(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Recipe keys and values as the fields of the family's transformers configuration."""
    family, values = FAMILIES[name], resolved(name, values)
    fields = {family.fields[key]: value for key, value in values.items() if value is not None or key in family.defaults}
    theta = fields.pop("rope_theta", None)
    if theta is not None:
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    if family.latent_attention:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    if name == "deepseek_v2":
        fields["topk_method"] = "group_limited_greedy" if fields["n_group"] > 1 else "greedy"
    return fields


def family_of(kind: str) -> Family:
    """The entry of a ``model_type``, dense ones too. Raises KeyError for any other."""
    return FAMILIES[kind] if kind in FAMILIES else DENSE[kind]


def known_families() -> str:
    """For error messages."""
    return ", ".join(FAMILIES)
