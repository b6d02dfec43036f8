"""The published methods whose experts are trained adapters; :mod:`lora.methods` says how a method is written."""

from __future__ import annotations

from typing import Any

Values = dict[str, Any]


def arrow() -> Values:
    """Arrow (arXiv 2405.11157): trained LoRAs, of which each token chooses by what they amplify. Nothing trains.

    y = W x + sum over S of g_e s_e B_e A_e x,  S = the top_k of |v_e x|,  g = softmax over S of |v_e x| / temperature
    v_e is the right singular vector of B_e A_e for its largest singular value; it has length 1, x is as it is

    adapters must be given: folders of adapters that are exactly LoRA, trained on the same base and layers. r is the
    largest of their ranks. `planaria adapter arrow` makes an adapter of them without a run.
    Defaults: router token, score arrow, combine top_k, top_k 3, temperature 1.
    Not verified: top_k and temperature, which are those of PEFT's implementation; the paper's were not looked up.
    """
    return {"router": "token", "score": "arrow", "combine": "top_k", "top_k": 3, "temperature": 1.0}


def mole() -> Values:
    """MOLE (ICLR 2024, arXiv 2404.13628): trained LoRAs, weighed by all that they say. The gates train, nothing else.

    y = W x + sum_e g_e s_e B_e A_e x,  g = softmax(W_g n / tau),  tau trained
    n = all s_e B_e A_e x in one row, divided by its root mean square;  each token and each adapted layer by itself
    loss - c sum_e log q_e, q_e the mean of g_e over the tokens of all layers together

    adapters must be given: folders of adapters that are exactly LoRA, trained on the same base and layers. r is the
    largest of their ranks. Leaving adapters out at inference, as the paper does, is not offered.
    Defaults: router token, score outputs, combine soft, temperature 1, balance product, balance_pooled true,
    router_aux_loss_coef 0.5.
    Not verified: which normalisation, the start of tau, c, and that tokens are weighed apart: the paper flattens a
    whole input, of one length. No code was published.
    """
    return {
        "router": "token",
        "score": "outputs",
        "combine": "soft",
        "temperature": 1.0,
        "balance": "product",
        "balance_pooled": True,
        "router_aux_loss_coef": 0.5,
    }


def x_lora() -> Values:
    """X-LoRA (arXiv 2402.07148): trained LoRAs, weighed by what the base model makes of the text. The head trains.

    y_m = W_m x + sum_e g_me s_e B_me A_me x,  g_m = softmax((W_g h + b)_m / temperature), for each adapted module m
    h = the model's last hidden state of the token, after its last norm, in a first pass without any adapter and without
    gradients;  each module has E rows of W_g and of b

    adapters must be given: folders of adapters that are exactly LoRA, trained on the same base and layers. r is the
    largest of their ranks. With num_experts instead of adapters the experts begin untrained and train as well. The
    model runs twice, which adds about half of a step on a frozen base. combine top_k keeps the largest weights
    (renormalise: false keeps them as they are).
    Defaults: router token, score states, combine soft, temperature 1.
    Not verified: the paper was not looked up; the formula is that of PEFT's implementation with xlora_depth 1 and
    layerwise_scalings, as the first of its authors' published models has it (a later one has depth 2). Deeper heads,
    with layers that modules share, and one head for all modules are not offered.
    """
    return {"router": "token", "score": "states", "combine": "soft", "temperature": 1.0}
