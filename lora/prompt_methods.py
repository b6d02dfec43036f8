"""The published method that asks a prompt once; :mod:`lora.methods` says how a method is written."""

from __future__ import annotations

from typing import Any

Values = dict[str, Any]


def milora() -> Values:
    """MiLoRA (arXiv 2410.18035): each adapted module of a layer is one expert, chosen once by the prompt.

    y_m = W_m x + g_m s B_m A_m x,  p = softmax(W_r GELU(h)),  S = the top_k of p,  g_m = p_m / sum of p over S, else 0
    h = the mean of what the decoder layer is given over the prompt's tokens;  one W_r in each layer, with a row for
    each module;  g holds for all tokens of the sample, and for all that are generated
    loss + c M / k sum_m f_m P_m, of a layer's M modules: f_m the samples that chose m, by samples, P_m the mean of p_m

    The prompt is what comes before a sample's first token with loss, so data.format is chat.
    Defaults: targets q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj, router prompt, combine top_k,
    top_k 3, router_init 0.02, balance switch, router_aux_loss_coef 0.01.
    Not verified: seen were the paper's abstract and the caption of its first figure, which have a pooler, an activation
    and the router before each layer. Which pooler (here the mean) and activation (here GELU; both may be trained
    there), the renormalisation, every number, and the form of the loss are not known. No code was found.
    """
    return {
        "targets": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "router": "prompt",
        "combine": "top_k",
        "top_k": 3,
        "router_init": 0.02,
        "balance": "switch",
        "router_aux_loss_coef": 0.01,
    }
