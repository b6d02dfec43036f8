"""The sections of a recipe, as plain frozen values.

Ranges of single keys stand in the annotations; what ties several keys together is in
``trainer.recipe_checks``. ``docs`` of a key are the attribute comments here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MinLen

from lora.config import BankConfig

_MOST = 2**62  # sums with others still fit 64 bits
Count = Annotated[int, Ge(1), Le(_MOST)]
CountOrZero = Annotated[int, Ge(0), Le(_MOST)]
Few = Annotated[int, Ge(1), Le(10_000)]  # what is counted one by one when a run is planned
Text = Annotated[str, MinLen(1)]
Above0 = Annotated[float, Gt(0)]
AtLeast0 = Annotated[float, Ge(0)]
Probability = Annotated[float, Ge(0), Lt(1)]

AutoCount = Count | Literal["auto"]

_STRICT = {"extra": "forbid", "allow_inf_nan": False}


@dataclass(frozen=True, kw_only=True)
class SoftSection:
    """A block without top-k routing in every MoE block's place, for research: it has no Hugging Face class."""

    __pydantic_config__ = _STRICT
    kind: Literal["none", "soft_moe", "merging"] = "none"
    slots: Count = 1  # soft_moe: of each expert
    segment: CountOrZero = 0  # merging: positions merged for at once, by those before; 0: whole sequences
    force: bool = False  # train a causal language model with a block that sees later tokens


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """Either ``family`` with a shape, or ``path``. :mod:`moe.family_table` says which keys a family has and needs."""

    __pydantic_config__ = _STRICT
    family: Literal["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss"] | None = None
    path: Text | None = None  # a Hugging Face folder, relative to the current directory
    # 0 or None: the family lacks it or has a default, or the folder's config.json says.
    hidden_size: Count = 0
    num_hidden_layers: Few = 0
    num_attention_heads: Count = 0
    num_key_value_heads: Count = 0
    moe_intermediate_size: Count = 0
    num_experts: Few = 0
    num_experts_per_tok: Count = 0
    head_dim: Count | None = None  # default: hidden_size / num_attention_heads
    norm_topk_prob: bool | None = None  # default: true
    max_position_embeddings: Count = 2048
    rope_theta: Above0 = 10000.0
    attention_dropout: Probability = 0.0
    initializer_range: Above0 = 0.02
    tie_word_embeddings: bool = False
    sliding_window: Count | None = None  # mixtral: none; gpt_oss: 128, in every other layer
    shared_expert_intermediate_size: Count | None = None  # qwen2_moe
    # DeepSeek's: shared experts, latent attention, group-limited routing, dense layers before those with experts.
    n_shared_experts: Count | None = None
    q_lora_rank: Count | None = None  # default: queries without a low rank
    kv_lora_rank: Count | None = None
    qk_rope_head_dim: Count | None = None
    qk_nope_head_dim: Count | None = None
    v_head_dim: Count | None = None
    n_group: Count | None = None  # default: 1
    topk_group: Count | None = None  # default: 1
    routed_scaling_factor: Above0 | None = None  # default: 1.0
    first_k_dense_replace: CountOrZero | None = None  # default: 0
    intermediate_size: Count | None = None  # of the dense layers
    router_aux_loss_coef: AtLeast0 = 0.0
    experts_backend: Literal["auto", "reference", "grouped_mm", "minimal", "triton"] = "auto"
    frozen_experts: CountOrZero = 0  # with path: only routers and experts from this number on train; 0: everything does
    trainable_experts: Text | None = None  # with path: a file of `planaria esft select`; only these experts train
    soft: SoftSection = field(default_factory=SoftSection)


@dataclass(frozen=True, kw_only=True)
class RoutingSection:
    """How tokens choose experts. A key that is None is the model's own, or the method's."""

    __pydantic_config__ = _STRICT
    method: Literal["model", "top_k", "switch", "gshard", "expert_choice"] = "model"
    score: Literal["softmax", "sigmoid"] | None = None
    top_k: Count | None = None
    norm_topk_prob: bool | None = None
    routed_scaling_factor: Above0 | None = None
    n_group: Count | None = None
    topk_group: Count | None = None
    group_score: Literal["max", "top2"] | None = None
    jitter: Probability = 0.0
    capacity_factor: Above0 | None = None
    drop_by: Literal["position", "probability"] | None = None
    force: bool = False  # expert choice in a causal language model

    def choices(self, own: int) -> int:
        """Experts per token, where the model alone has ``own``."""
        return {"switch": 1, "gshard": 2}.get(self.method, self.top_k or own)


@dataclass(frozen=True, kw_only=True)
class BalanceSection:
    """Losses and biases that keep experts evenly used."""

    __pydantic_config__ = _STRICT
    aux_loss: Literal["none", "micro_batch", "sequence", "global_batch", "hf"] = "none"
    aux_loss_coef: AtLeast0 = 0.0
    expert_loss_coef: AtLeast0 = 0.0
    device_loss_coef: AtLeast0 = 0.0
    communication_loss_coef: AtLeast0 = 0.0
    z_loss_coef: AtLeast0 = 0.0
    bias_update_rate: AtLeast0 = 0.0


@dataclass(frozen=True, kw_only=True)
class TokenizerSection:
    """``bpe`` is trained on the text, ``bytes`` has one token per byte, ``model`` is the folder's own."""

    __pydantic_config__ = _STRICT
    kind: Literal["bpe", "bytes", "model"]
    vocab_size: CountOrZero = 0  # bpe only; resolved to 257 for bytes, 0 for model


@dataclass(frozen=True, kw_only=True)
class DataSection:
    __pydantic_config__ = _STRICT
    source: Literal["stdlib", "files"]
    include: Annotated[tuple[Text, ...], MinLen(1)]  # globs; resolved to absolute ones for files
    tokenizer: TokenizerSection
    sequence_length: Annotated[int, Ge(2)]
    format: Literal["text", "jsonl", "chat"] = "text"
    text_key: Text | None = None  # jsonl only; default "text"
    # chat only; resolved to model, all, true, truncate.
    chat_template: Text | None = None  # model, plain, or a Jinja file, relative to the recipe's folder
    answers: Literal["all", "last"] | None = None  # which of a conversation's answers have loss
    packing: bool | None = None  # several samples in a sequence, which do not see each other; else one, and padding
    overlong: Literal["truncate", "drop"] | None = None  # what becomes of samples longer than a sequence
    task_key: Text | None = None  # the field of a row that names its task
    heldout_fraction: Annotated[float, Gt(0), Le(0.5)] = 0.02
    cache_dir: Text | None = None  # default: cache/ in log.dir


@dataclass(frozen=True, kw_only=True)
class TenantData:
    """What a tenant reads; a key that is None is ``data``'s. Tokenizer and sequence length are the same for all."""

    __pydantic_config__ = _STRICT
    source: Literal["stdlib", "files"] | None = None
    include: Annotated[tuple[Text, ...], MinLen(1)] | None = None
    format: Literal["text", "jsonl", "chat"] | None = None
    text_key: Text | None = None
    heldout_fraction: Annotated[float, Gt(0), Le(0.5)] | None = None


@dataclass(frozen=True, kw_only=True)
class TenantSection:
    """One of several adapters that train at once; a key that is None is ``train``'s."""

    __pydantic_config__ = _STRICT
    data: TenantData = field(default_factory=TenantData)
    steps: Count | None = None  # at most train.steps
    lr: Above0 | None = None
    min_lr_ratio: Annotated[float, Ge(0), Le(1)] | None = None
    warmup_steps: CountOrZero | None = None
    schedule: Literal["cosine", "constant"] | None = None
    weight_decay: AtLeast0 | None = None
    max_grad_norm: AtLeast0 | None = None
    seed: CountOrZero | None = None  # of the adapter, sample order and dropout
    micro_batch_size: Count | None = None  # sequences of this tenant per worker and forward pass
    max_bad_steps: Count = 3  # in a row whose loss or gradient is no number, after which it stops


@dataclass(frozen=True, kw_only=True)
class DeadlinesSection:
    """Seconds that a worker may stay in one phase before it counts as stuck and is killed; 0: for ever."""

    __pydantic_config__ = _STRICT
    step: AtLeast0 = 10.0  # forward, backward, exchange, optimizer, capture: each of them
    first_step: AtLeast0 = 300.0  # the same, in the first step after a start
    build: AtLeast0 = 600.0  # imports, joining, data, model, engine
    load: AtLeast0 = 300.0
    evaluate: AtLeast0 = 300.0
    finish: AtLeast0 = 900.0


@dataclass(frozen=True, kw_only=True)
class ParallelSection:
    __pydantic_config__ = _STRICT
    workers: Count = 1
    ep: Count = 1  # workers that share one set of experts
    dispatch: Literal["auto", "all_to_all", "deduplicated"] = (
        "auto"  # auto: deduplicated if tokens have several experts
    )
    overlap: Literal["none", "shared"] = "none"  # what is computed while tokens travel
    zero: int = 1
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # auto: fp32 on CPU, bf16 on GPU
    device: Literal["auto", "cpu", "cuda"] = "auto"
    restarts: CountOrZero = 3
    memory_gib: Above0 | Literal["auto"] = "auto"  # that a worker may take, by which tenants are admitted; auto: free
    deadlines: DeadlinesSection = field(default_factory=DeadlinesSection)


@dataclass(frozen=True, kw_only=True)
class MtpSection:
    """Multi-token prediction: modules that predict further tokens in training, and are not exported."""

    __pydantic_config__ = _STRICT
    depth: CountOrZero = 0  # modules; 0: none
    weight: Above0 = 0.3  # of the mean of their losses


@dataclass(frozen=True, kw_only=True)
class TrainSection:
    __pydantic_config__ = _STRICT
    steps: Count
    global_batch_size: Count  # sequences per optimizer step, over all workers
    micro_batch_size: Count  # sequences per worker and forward pass
    lr: Above0
    min_lr_ratio: Annotated[float, Ge(0), Le(1)] = 0.1
    warmup_steps: CountOrZero = 0
    schedule: Literal["cosine", "constant"] = "cosine"
    optimizer: Literal["adamw", "sgd", "lion"] = "adamw"
    weight_decay: AtLeast0 = 0.0
    # None: the optimizer lacks it, or has a default (trainer.optimizer_rules).
    beta1: Probability | None = None
    beta2: Probability | None = None
    eps: Above0 | None = None
    momentum: Annotated[float, Gt(0), Lt(1)] | None = None
    max_grad_norm: AtLeast0 = 1.0  # 0: no clipping
    seed: CountOrZero = 0
    eval_every: CountOrZero = 0  # 0: at the start and the end only
    eval_sequences: Count = 32
    replay_trace: Text | None = None  # a run whose recorded routing is followed, or "balanced"
    mtp: MtpSection = field(default_factory=MtpSection)


@dataclass(frozen=True, kw_only=True)
class MemorySection:
    __pydantic_config__ = _STRICT
    enabled: bool = True
    every: Count = 1
    budget_gib: Above0 | Literal["auto"] = "auto"  # of each machine; auto: a share of what is free at the start


@dataclass(frozen=True, kw_only=True)
class DiskSection:
    __pydantic_config__ = _STRICT
    every: CountOrZero = 0  # 0: never during the run
    keep_last: Count = 2
    permanent_every: CountOrZero = 0  # steps that are multiples are never removed; 0: none is
    final: bool = True
    url: Text | None = None  # default: checkpoints/ in the run's folder
    hung_after_s: Above0 = 60.0


@dataclass(frozen=True, kw_only=True)
class WalSection:
    __pydantic_config__ = _STRICT
    rotation: Annotated[int, Ge(2)] | Literal["auto"] = "auto"  # steps in which every part is captured once


@dataclass(frozen=True, kw_only=True)
class PecSection:
    """Partial experts: of each layer's experts, only some are captured at a time."""

    __pydantic_config__ = _STRICT
    k_snapshot: AutoCount = "auto"  # experts of each layer per capture in memory
    k_persist: Count = 1  # of these, how many go to disk
    selection: Literal["sequential", "load_aware"] = "sequential"
    max_plt: Annotated[float, Gt(0), Le(1)] = 0.0375  # proportion of lost tokens
    dynamic_k: bool = True
    fallback: Literal["wal", "dense"] = "wal"  # the exact mode that max_plt switches to


@dataclass(frozen=True, kw_only=True)
class CheckpointSection:
    __pydantic_config__ = _STRICT
    mode: Literal["wal", "dense", "pec"] = "wal"
    memory: MemorySection = field(default_factory=MemorySection)
    disk: DiskSection = field(default_factory=DiskSection)
    wal: WalSection = field(default_factory=WalSection)
    pec: PecSection = field(default_factory=PecSection)
    load_from: Text | None = None  # a run, or one of its checkpoints, whose state a new run begins with
    linger_s: CountOrZero = 600  # how long the keeper waits without workers


@dataclass(frozen=True, kw_only=True)
class LogSection:
    __pydantic_config__ = _STRICT
    run: Text = ""  # default: the recipe file's stem
    dir: Text = "runs"
    every: Count = 10
    routing_trace: bool = False  # record where every token is routed


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run, wholly described. Read by ``trainer.recipe.load_recipe``."""

    __pydantic_config__ = _STRICT
    model: ModelSection
    routing: RoutingSection = field(default_factory=RoutingSection)
    balance: BalanceSection = field(default_factory=BalanceSection)
    data: DataSection
    parallel: ParallelSection = field(default_factory=ParallelSection)
    train: TrainSection
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    adapter: dict[str, BankConfig] = field(default_factory=dict)
    tenants: dict[str, TenantSection] = field(default_factory=dict)
    log: LogSection = field(default_factory=LogSection)

    @property
    def accumulation(self) -> int:
        """Micro-batches that each worker runs per optimizer step."""
        return self.train.global_batch_size // (self.train.micro_batch_size * self.parallel.workers)


@dataclass(frozen=True)
class Key:
    """One key of the schema; ``required`` keys have no default."""

    path: tuple[str, ...]  # the name of an adapter bank or tenant is "*"
    section: bool
    required: bool
    default: Any
    annotation: Any


def _keys(section: type, prefix: tuple[str, ...]) -> Iterator[Key]:
    hints = get_type_hints(section, include_extras=True)
    for entry in dataclasses.fields(section):
        path, hint = (*prefix, entry.name), hints[entry.name]
        banks = get_args(hint)[1] if get_origin(hint) is dict else None
        nested = banks or (hint if isinstance(hint, type) and dataclasses.is_dataclass(hint) else None)
        default = entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
        required = default is dataclasses.MISSING
        yield Key(path, nested is not None, required, default, hint)
        if nested is not None:
            yield from _keys(nested, (*path, "*") if banks else path)


KEYS: dict[tuple[str, ...], Key] = {key.path: key for key in _keys(Recipe, ())}


NAMED = (("adapter",), ("tenants",))  # sections whose keys are the user's own names


def schema_path(path: tuple[str | int, ...]) -> tuple[str, ...]:
    """``path`` with the name of a bank or tenant replaced by ``*`` and list indices dropped."""
    names = tuple(part for part in path if isinstance(part, str))
    return (names[0], "*", *names[2:]) if names[:1] in NAMED and len(names) > 1 else names


def children(path: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the keys directly inside the section ``path`` (a schema path)."""
    return tuple(p[-1] for p in KEYS if p[:-1] == path)
