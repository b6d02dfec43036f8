"""What a recipe says about one bank of adapters: site, bank, router, combine, objective, allocation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Preset = Literal[
    "lora",
    "rslora",
    "expert-lora",
    "expert-lora-shared",
    "expert-lora-shared-outer",
    "mixlora",
    "mixlora-dynamic",
    "mixlora-switch",
    "molora",
    "mov",
    "loramoe",
    "mola",
    "moelora",
    "moelora-task",
    "hydralora",
    "adamole",
    "moslora",
    "perft-r",
    "perft-e",
    "perft-d",
    "perft-s",
    "arrow",
    "mole",
    "milora",
    "x-lora",
]
Site = Literal["linear", "experts", "ffn", "parallel"]
Share = Literal["none", "A", "all", "outer"]
Kind = Literal["lowrank", "scale"]
Scope = Literal["none", "base", "token", "task", "prompt"]
Combine = Literal["static", "sum", "soft", "top_k", "top_p", "threshold", "switch"]
Score = Literal["linear", "arrow", "outputs", "states"]
Balance = Literal["none", "switch", "localized_cv2", "product"]
Count = int | tuple[int, ...]


@dataclass(frozen=True)
class BankConfig:
    """One adapter bank. A field that is None (or empty) is the preset's; :func:`lora.presets.expand` fills it in.

    The delta at a site is ``Combine(Router(x), Bank)(x)``: E low-rank experts ``s B_e C_e A_e``, which of them a token
    uses and with what weights, and how their outputs are summed.

    Attributes:
        preset: a published method; decides every field that is not given.
        targets: patterns of what the bank is put on: names of linear layers (linear), of an expert's stacked tensors
            (experts), of feed-forward blocks (ffn) or MoE blocks (parallel).
        site: ``linear`` adapts linear layers; ``experts`` the stacked weights of routed experts; ``ffn`` runs a whole
            dense feed-forward block once per adapter expert; ``parallel`` adds a residual beside an MoE block.
        adapters: folders of trained adapters, which are the bank's experts and stay as they are; E is their number.
        num_experts: E, low-rank experts of one site; a list gives groups of neighbouring layers their own numbers.
        r: rank of each, before ``rank_rule``; a list as for ``num_experts``.
        rank_rule: ``fixed``: r as it is; ``per_active``: r divided by the experts a token uses; ``per_total``: r
            divided by E.
        alpha: the update is scaled by ``alpha / r``, or by ``alpha / sqrt(r)`` with ``scaling: sqrt_r`` (rsLoRA).
        share: which factors all experts of a site have in common: ``A`` (HydraLoRA), ``all`` (one adapter for all
            routed experts of a layer), ``outer`` (A of gate_up_proj and B of down_proj).
        kind: ``lowrank``, or ``scale``: vectors that scale a linear's output (IA3).
        mixer: a trained [r, r] matrix between A and B (MoSLoRA).
        dropout: of the adapter's input, in training.
        a_init, router_init: ``kaiming`` uniform with a = sqrt 5, or the standard deviation of a normal.
        router: what chooses: nobody, the ``base`` model's own MoE router, each ``token``'s hidden state, the
            ``task`` of the sample, or its ``prompt``: once for all of its tokens, among the modules of a layer, each of
            which is an expert.
        task_embedding: width of a task's embedding.
        num_tasks: how many tasks there are.
        score: of an expert, for a token's state x: ``linear``: w_e x, trained; ``arrow``: |v_e x|, where v_e is the
            direction that a trained adapter amplifies most; ``outputs``: w_e times the outputs of all trained adapters;
            ``states``: w_e h + b_e, where h is the last hidden state of a first pass without adapters.
        temperature: what scores are divided by before the softmax, where ``score`` is not linear; trained if they are
            of outputs.
        jitter: multiplies the router's input by a uniform draw from [1 - jitter, 1 + jitter], in training.
        combine: ``static`` one expert; ``sum`` all with weight 1; ``soft`` all, weighted; ``top_k``; ``top_p``;
            ``threshold`` those above a learned threshold; ``switch`` the best one, with a capacity.
        top_k: of combine top_k.
        renormalise: whether chosen weights are made to sum to one.
        top_p: of combine top_p.
        capacity: of combine switch, the most tokens that one expert takes, as a multiple of the even share.
        max_threshold: of combine threshold; 0: 1 / E.
        balance: ``switch``, LoRAMoE's ``localized_cv2``, or MOLE's ``product``.
        router_aux_loss_coef: its coefficient.
        balance_pooled: whether the loss counts over all layers together instead of in each.
        localized_delta: of localized_cv2, how far the importance of experts differs between task types.
        z_loss_coef: of the router's z-loss.
        contrastive_coef, contrastive_temperature: of the loss that sets outputs of different experts apart.
    """

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}  # noqa: RUF012 - read where recipes are checked

    preset: Preset
    targets: tuple[str, ...] = ()
    site: Site | None = None
    adapters: tuple[str, ...] = ()
    num_experts: Count | None = None
    r: Count | None = None
    rank_rule: Literal["fixed", "per_active", "per_total"] | None = None
    alpha: float | None = None
    scaling: Literal["r", "sqrt_r"] | None = None
    share: Share | None = None
    kind: Kind | None = None
    mixer: bool | None = None
    dropout: float | None = None
    a_init: Literal["kaiming"] | float | None = None
    router_init: Literal["kaiming"] | float | None = None
    router: Scope | None = None
    task_embedding: int | None = None
    num_tasks: int | None = None
    score: Score | None = None
    temperature: float | None = None
    jitter: float | None = None
    combine: Combine | None = None
    top_k: int | None = None
    renormalise: bool | None = None
    top_p: float | None = None
    capacity: float | None = None
    max_threshold: float | None = None
    balance: Balance | None = None
    router_aux_loss_coef: float | None = None
    balance_pooled: bool | None = None
    localized_delta: float | None = None
    z_loss_coef: float | None = None
    contrastive_coef: float | None = None
    contrastive_temperature: float | None = None


@dataclass(frozen=True)
class BankAt:
    """An expanded bank at one layer: every field has a value, and lists are resolved. Made by :func:`bank_at`.

    Attributes:
        config: expanded.
        num_experts: E at this layer. Banks that follow the base router have the layer's routed experts instead.
        r: rank of each expert, after ``rank_rule``.
        scale: what the product of the factors is multiplied by.
    """

    config: BankConfig
    num_experts: int
    r: int
    scale: float
