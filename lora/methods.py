"""The published methods, one function each: its docstring says what is computed, its values are the defaults.

``planaria adapter presets NAME`` prints the docstring. Notation: x is the input of the adapted module and W its frozen
weight; A_e [r, in] and B_e [out, r] are the factors of expert e of E; s = alpha / r; B starts at zero. "Not verified"
names what neither the paper nor the authors' code was seen to say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lora.config import Preset
from lora.prompt_methods import milora
from lora.trained_methods import arrow, mole, x_lora

EXPERT_TENSORS = ("gate_up_proj", "down_proj")
ATTENTION = ("q_proj", "v_proj")
FFN = ("gate_proj", "up_proj", "down_proj")

Values = dict[str, Any]
Method = Callable[[], Values]


def lora() -> Values:
    """LoRA (arXiv 2106.09685).

    y = W x + s B A dropout(x)

    Defaults: none but the neutral ones.
    Not verified: nothing.
    """
    return {}


def rslora() -> Values:
    """Rank-stabilised LoRA (arXiv 2312.03732).

    y = W x + s B A dropout(x),  s = alpha / sqrt(r)

    Defaults: scaling sqrt_r.
    Not verified: nothing.
    """
    return {"scaling": "sqrt_r"}


def expert_lora() -> Values:
    """LoRA (arXiv 2106.09685) on every routed expert, as PEFT's target_parameters.

    h_e = (W1_e + s B1_e A1_e) x,  y_e = (W2_e + s B2_e A2_e) act(h_e)
    for the experts e that the model's own router chose, with its weights; W1 is gate_up_proj, W2 is down_proj

    Defaults: site experts, targets gate_up_proj and down_proj, router base, combine top_k.
    Not verified: nothing.
    """
    return {"site": "experts", "targets": EXPERT_TENSORS, "router": "base", "combine": "top_k"}


def expert_lora_shared() -> Values:
    """One LoRA for all routed experts of a layer (no paper; an option of VeOmni and Megatron-Bridge).

    h_e = (W1_e + s B1 A1) x,  y_e = (W2_e + s B2 A2) act(h_e)

    Defaults: share all; the rest as expert-lora.
    Not verified: nothing.
    """
    return expert_lora() | {"share": "all"}


def expert_lora_shared_outer() -> Values:
    """LoRA on routed experts, the outer factors shared (no paper; an option of Megatron-Bridge and SGLang).

    h_e = (W1_e + s B1_e A1) x,  y_e = (W2_e + s B2 A2_e) act(h_e)

    Defaults: share outer; the rest as expert-lora.
    Not verified: nothing.
    """
    return expert_lora() | {"share": "outer"}


def mixlora() -> Values:
    """MixLoRA (arXiv 2404.15159), on dense feed-forward blocks.

    p = softmax(W_g x) in fp32,  S = the top_k of p,  g_e = p_e / sum of p over S
    F_e(x) = (W2 + s B2_e A2_e) ( SiLU((W1 + s B1_e A1_e) x) * (W3 + s B3_e A3_e) x )
    y = sum over S of g_e F_e(x)
    loss + c E sum_e f_e P_e, f the choices of e per token and P its mean p, over the tokens of all layers together

    Put plain LoRA on the attention with a second bank.
    Defaults: site ffn, targets mlp, num_experts 8, top_k 2, r 16, alpha 32, dropout 0.05, router token,
    router_init 0.02, combine top_k, balance switch, balance_pooled true, router_aux_loss_coef 0.001.
    Not verified: the coefficient c is the code's default; the authors' examples use 0.01.
    """
    return {
        "site": "ffn",
        "targets": ("mlp",),
        "num_experts": 8,
        "top_k": 2,
        "r": 16,
        "alpha": 32.0,
        "dropout": 0.05,
        "router": "token",
        "router_init": 0.02,
        "combine": "top_k",
        "balance": "switch",
        "balance_pooled": True,
        "router_aux_loss_coef": 0.001,
    }


def mixlora_dynamic() -> Values:
    """MixLoRA (arXiv 2404.15159) with as many experts as it takes.

    S = the fewest experts whose p sum to top_p at least,  g_e = p_e, not renormalised;  the rest as mixlora

    Defaults: combine top_p, top_p 0.8, renormalise false; the rest as mixlora.
    Not verified: nothing (from the authors' code; the paper does not describe it).
    """
    return mixlora() | {"combine": "top_p", "top_p": 0.8, "renormalise": False}


def mixlora_switch() -> Values:
    """MixLoRA (arXiv 2404.15159) with Switch routing.

    S = the one best expert,  g_e = p_e;  an expert takes at most capacity times its even share of the tokens
    loss + z_loss_coef mean (logsumexp of the logits)^2;  jitter on the router's input;  the rest as mixlora

    Defaults: combine switch, capacity 32, z_loss_coef 0.001, jitter 0.01, router_init 1.0; the rest as mixlora.
    Not verified: that the authors' expert capacity of 32 is a multiple of the even share.
    """
    return mixlora() | {
        "combine": "switch",
        "capacity": 32.0,
        "z_loss_coef": 0.001,
        "jitter": 0.01,
        "router_init": 1.0,
    }


def molora() -> Values:
    """MoLoRA (arXiv 2309.05444).

    y = W x + sum_e g_e s B_e A_e x,  g = softmax(W_g x) in fp32, all experts, no bias

    Defaults: num_experts 10, r 4, router token, combine soft, a_init 0.02, router_init 0.02.
    Not verified: alpha.
    """
    return {
        "router": "token",
        "combine": "soft",
        "num_experts": 10,
        "r": 4,
        "a_init": 0.02,
        "router_init": 0.02,
    }


def mov() -> Values:
    """MoV (arXiv 2309.05444): routed vectors that scale a linear layer's output, mixed before they are applied.

    y = (sum_e g_e l_e) * W x,  g = softmax(W_g x) in fp32;  every l_e [out] starts at one

    Defaults: kind scale, num_experts 30, router token, combine soft, router_init 0.02.
    Not verified: nothing.
    """
    return {"kind": "scale", "router": "token", "combine": "soft", "num_experts": 30, "router_init": 0.02}


def loramoe() -> Values:
    """LoRAMoE (arXiv 2312.09979).

    y = W x + sum_e g_e s B_e A_e x,  g = softmax(W_r x), for each linear layer of the feed-forward block
    loss + c CV^2(Q * I) of each, over all samples m of a micro-batch and experts e: Q_me sums g_e over the tokens of
    the sample (a row, or a sample packed into one), I_me is 1 + localized_delta for the half of the experts that
    belongs to the type of the sample's task and 1 - localized_delta for the other. Type 0 is task 0 of data.task_key,
    type 1 are all others.

    Defaults: targets gate_proj, up_proj and down_proj, num_experts 8, r 4, alpha 32, router token, combine soft,
    balance localized_cv2, router_aux_loss_coef 0, localized_delta 0.1.
    Not verified: the paper's delta and c, about 0.1 each, and its E of 6. The loss is off here as in the authors'
    script.
    """
    return {
        "targets": FFN,
        "num_experts": 8,
        "r": 4,
        "alpha": 32.0,
        "router": "token",
        "combine": "soft",
        "balance": "localized_cv2",
        "router_aux_loss_coef": 0.0,
        "localized_delta": 0.1,
    }


def mola() -> Values:
    """MoLA (arXiv 2402.08562).

    y = W x + sum over S of g_e s B_e A_e x,  p = softmax(W_g x),  S = the top_k of p,  g_e = p_e / sum of p over S
    loss + c E sum_e f_e P_e in every layer by itself, f the share of choices

    The paper gives upper layers more experts: num_experts: [2, 4, 6, 8], a quarter of the layers each.
    Defaults: num_experts 4, top_k 2, r 8, alpha 16, router token, combine top_k, balance switch,
    router_aux_loss_coef 0.
    Not verified: nothing. The loss is off here as in the authors' code, whose coefficient is 0.001; the paper adapts
    all seven projections.
    """
    return {
        "num_experts": 4,
        "top_k": 2,
        "r": 8,
        "alpha": 16.0,
        "router": "token",
        "combine": "top_k",
        "balance": "switch",
        "router_aux_loss_coef": 0.0,
    }


def moelora() -> Values:
    """MoELoRA with a contrastive loss (arXiv 2402.12851).

    y = W x + sum over S of g_e s B_e A_e x,  p = softmax(W_g x),  S = the top_k of p,  g_e = p_e / sum of p over S
    loss + c E sum_e f_e P_e + contrastive_coef * InfoNCE: outputs of one expert are each other's positives, those of
    other experts negatives, at contrastive_temperature

    Defaults: num_experts 8, top_k 2, router token, combine top_k, balance switch, router_aux_loss_coef 0.01,
    contrastive_coef 0.01, contrastive_temperature 0.07.
    Not verified: both coefficients, the temperature, r and alpha.
    """
    return {
        "num_experts": 8,
        "top_k": 2,
        "router": "token",
        "combine": "top_k",
        "balance": "switch",
        "router_aux_loss_coef": 0.01,
        "contrastive_coef": 0.01,
        "contrastive_temperature": 0.07,
    }


def moelora_task() -> Values:
    """MOELoRA (SIGIR 2024, arXiv 2310.18339): experts weighted by the task of the sample.

    y = W x + sum_e g_e s B_e A_e x,  g = softmax(W_g Emb(task)),  every expert of rank r / E
    Adapted layers have their own Emb and W_g. num_tasks must be given.

    Defaults: num_experts 8, r 16, rank_rule per_total, router task, task_embedding 64, combine soft, dropout 0.1,
    a_init 0.01.
    Not verified: alpha.
    """
    return {
        "num_experts": 8,
        "r": 16,
        "rank_rule": "per_total",
        "router": "task",
        "task_embedding": 64,
        "combine": "soft",
        "dropout": 0.1,
        "a_init": 0.01,
    }


def hydralora() -> Values:
    """HydraLoRA (arXiv 2404.19245).

    y = W x + sum_e g_e s B_e A x,  g = softmax(W_g x);  one A for all experts

    Defaults: num_experts 3, r 4, alpha 32, share A, router token, combine soft.
    Not verified: nothing; the paper finds num_experts, 3 or 4, by clustering the data.
    """
    return {"num_experts": 3, "r": 4, "alpha": 32.0, "share": "A", "router": "token", "combine": "soft"}


def adamole() -> Values:
    """AdaMoLE (arXiv 2405.00361): a threshold of the token's own decides how many experts it uses.

    p = softmax(W_g x),  tau = sigmoid(W_t x + b) * max_threshold,  g_e = max(p_e - tau, 0) / their sum
    No expert at all may be left, and then nothing is added.
    y = W x + sum_e g_e s B_e A_e x;  loss + c E sum_e f_e P_e

    Defaults: num_experts 4, router token, combine threshold, max_threshold 0 (1 / E), balance switch,
    router_aux_loss_coef 0.01.
    Not verified: r and alpha; c is the default of the authors' trainer, whose command line leaves the loss off.
    """
    return {
        "num_experts": 4,
        "router": "token",
        "combine": "threshold",
        "max_threshold": 0.0,
        "balance": "switch",
        "router_aux_loss_coef": 0.01,
    }


def moslora() -> Values:
    """MoSLoRA (arXiv 2406.11909): a trained matrix between the factors.

    y = W x + s B M A dropout(x),  M [r, r] starts kaiming-uniform

    Defaults: mixer true.
    Not verified: nothing.
    """
    return {"mixer": True}


def perft_r() -> Values:
    """PERFT-R (arXiv 2411.08212): a routed bank of low-rank branches beside the MoE block.

    y = MoE(x) + sum over S of g_e s B_e A_e x,  p = softmax(W_g x),  S = the top_k of p,  g_e = p_e / sum of p over S

    Defaults: site parallel, targets mlp, num_experts 4, top_k 2, router token, combine top_k.
    Not verified: every number, the renormalisation, and that the branch is linear.
    """
    return {
        "site": "parallel",
        "targets": ("mlp",),
        "num_experts": 4,
        "top_k": 2,
        "router": "token",
        "combine": "top_k",
    }


def perft_e() -> Values:
    """PERFT-E (arXiv 2411.08212): a low-rank branch for each expert of the model, under the model's own router.

    y = MoE(x) + sum over S of G_e s B_e A_e x,  S and G as the model's router chose

    Defaults: site parallel, targets mlp, router base, combine top_k.
    Not verified: every number, and that the branch is linear.
    """
    return {"site": "parallel", "targets": ("mlp",), "router": "base", "combine": "top_k"}


def perft_d() -> Values:
    """PERFT-D (arXiv 2411.08212): several low-rank branches beside the MoE block, all of them, without a router.

    y = MoE(x) + sum_e s B_e A_e x

    Defaults: site parallel, targets mlp, num_experts 4, combine sum.
    Not verified: every number, and that the branch is linear.
    """
    return {"site": "parallel", "targets": ("mlp",), "num_experts": 4, "combine": "sum"}


def perft_s() -> Values:
    """PERFT-S (arXiv 2411.08212): one low-rank branch beside the MoE block.

    y = MoE(x) + s B A x

    Defaults: site parallel, targets mlp.
    Not verified: every number, and that the branch is linear.
    """
    return {"site": "parallel", "targets": ("mlp",)}


METHODS: dict[Preset, Method] = {
    "lora": lora,
    "rslora": rslora,
    "expert-lora": expert_lora,
    "expert-lora-shared": expert_lora_shared,
    "expert-lora-shared-outer": expert_lora_shared_outer,
    "mixlora": mixlora,
    "mixlora-dynamic": mixlora_dynamic,
    "mixlora-switch": mixlora_switch,
    "molora": molora,
    "mov": mov,
    "loramoe": loramoe,
    "mola": mola,
    "moelora": moelora,
    "moelora-task": moelora_task,
    "hydralora": hydralora,
    "adamole": adamole,
    "moslora": moslora,
    "perft-r": perft_r,
    "perft-e": perft_e,
    "perft-d": perft_d,
    "perft-s": perft_s,
    "arrow": arrow,
    "mole": mole,
    "milora": milora,
    "x-lora": x_lora,
}
