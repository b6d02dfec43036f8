"""The routers of adapter banks: what decides which low-rank experts a token uses, and with what weights.

Logits, probabilities and gates are fp32 or wider, whatever the model's dtype.

Shapes: T tokens, M features of the bank's input, D features of the router's, N tasks, E experts, K choices per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora.config import BankAt
from lora.errors import AdapterError
from lora.factors import start_init, uniform_init
from lora.first_pass import FirstPass
from lora.objectives import inject_losses, real_tokens
from moe.capacity import capacity, within_capacity
from moe.context import current
from moe.gates import jittered
from moe.refs import TensorAddress


@dataclass(frozen=True)
class Decision:
    """What a router decided for some tokens.

    Attributes:
        gate_TE: weight of each expert, zero for the ones that are not used. Router losses reach backward through it.
        logits_TE: scores before the softmax.
        probs_TE: what the balance loss takes the mean of: the softmax over all experts, less the threshold where the
            combine rule has one.
        chosen_TE: whether the token asked for the expert, be there room for it or not.
        index_TK: the choices, best first, where every token makes K; None where their number varies.
    """

    gate_TE: Tensor
    logits_TE: Tensor
    probs_TE: Tensor
    chosen_TE: Tensor
    index_TK: Tensor | None = None


class BankRouter(nn.Module):
    """Scores of E experts by each token's hidden state or by its sample's task, and the combine rule on them.

    The rules, with ``p = softmax(W h)`` and ``h`` the token's input or its task's embedding:

    * ``soft``: ``g = p``.
    * ``top_k``: the K largest of p, made to sum to one with ``renormalise``.
    * ``top_p``: the fewest of the largest whose sum reaches ``top_p`` (MixLoRA-dynamic, after arXiv 2403.07652).
    * ``threshold``: ``t = max_threshold * sigmoid(w h + b)``; the experts with ``p >= t``, weighted by ``p - t``, made
      to sum to one; no expert at all where none reaches it (AdaMoLE, arXiv 2405.00361, eq. 4-6).
    * ``switch``: the largest of p, weighted by p whatever ``renormalise`` says, for that is its only gradient. Each
      expert takes ``capacity`` times the even share of the tokens, earlier ones first and padding never; the others get
      weight zero (Switch Transformer, arXiv 2101.03961, eq. 2-3).

    With ``score: arrow`` it is ``p = softmax(|V h| / temperature)``, and the rows of V do not train; they are loaded.
    With ``score: states`` it is ``p = softmax((W h + b) / temperature)``, and h is the base model's last state of the
    token, from :mod:`lora.first_pass`. With ``score: outputs`` scores are those of :mod:`lora.output_scores`, and a
    trained ``temperature`` divides them.

    ``jitter`` multiplies h by a uniform draw from [1 - jitter, 1 + jitter] in training. It is drawn from the device's
    default generator, which checkpoints hold and activation checkpointing restores.

    Args:
        path: path of this module in the model, which ends in ``.adapter.router``.
        in_features: M; with ``score: outputs`` the experts' outputs together, with ``score: states`` the hidden size.
    """

    def __init__(self, path: str, in_features: int, here: BankAt, *, seed: int = 0, device=None, dtype=None) -> None:
        super().__init__()
        config = here.config
        assert config.router in ("token", "task"), f"{path}: lora.combinations lets no such bank through"
        self.path, self.here = path, here
        self._key, self._place = f"{seed}/{path}", {"device": device, "dtype": dtype}
        by_task = config.router == "task"
        width = config.task_embedding if by_task else in_features
        if config.score == "arrow":
            # Not a number until they are loaded: an adapter without its directions must not pass for one.
            self._add("weight", torch.full((here.num_experts, width), torch.nan)).requires_grad_(False)
        else:
            self._add("weight", start_init((here.num_experts, width), config.router_init, f"{self._key}.weight"))
        self.first_pass: FirstPass | None = None
        if config.score == "states":
            # As wide as the weight's, which the bound of the draw depends on; a linear layer's bias starts like that.
            self._add("bias", uniform_init((here.num_experts, width), f"{self._key}.bias")[:, 0].clone())
        if config.score == "outputs":
            self._add("temperature", torch.full((1,), float(config.temperature)))
        if by_task:
            self._add("task_embedding", start_init((config.num_tasks, width), 1.0, f"{self._key}.task_embedding"))
        if config.combine == "threshold":
            self._add("threshold_weight", uniform_init((1, width), f"{self._key}.threshold_weight"))
            # As wide as the weight's, which the bound of the draw depends on; a linear layer's bias starts like that.
            self._add("threshold_bias", uniform_init((width,), f"{self._key}.threshold_bias")[:1].clone())

    def _add(self, name: str, start: Tensor) -> nn.Parameter:
        parameter = nn.Parameter(start.to(**self._place))
        parameter.address = TensorAddress(f"{self.path}.{name}", tuple(parameter.shape))
        self.register_parameter(name, parameter)
        return parameter

    def forward(self, x_TM: Tensor) -> Decision:
        """Raises AdapterError if tokens have to be routed by tasks that the batch does not name."""
        if self.here.config.score == "states":
            h_TD = self._states(len(x_TM))
            logits_TE = wide_linear(h_TD, self.weight)
            return self.weigh(logits_TE + self.bias.to(logits_TE.dtype), h_TD)
        h_TD = self._tasks(x_TM) if self.here.config.router == "task" else x_TM
        jitter = self.here.config.jitter
        if jitter and self.training:
            h_TD = jittered(h_TD, jitter)
        logits_TE = wide_linear(h_TD, self.weight)
        if self.here.config.score == "arrow":  # a singular vector's sign means nothing
            logits_TE = logits_TE.abs()
        return self.weigh(logits_TE, h_TD)

    def weigh(self, scores_TE: Tensor, h_TD: Tensor) -> Decision:
        """The combine rule on scores, divided by the temperature if there is one, and the losses. ``h_TD``: routed."""
        score = self.here.config.score
        if score in ("arrow", "states"):
            scores_TE = scores_TE / self.here.config.temperature
        elif score == "outputs":
            scores_TE = scores_TE / self.temperature.to(scores_TE.dtype)
        return inject_losses(self._decide(scores_TE, h_TD), self.here, self.path)

    def _decide(self, logits_TE: Tensor, h_TD: Tensor) -> Decision:
        config, probs_TE = self.here.config, logits_TE.softmax(-1)
        if config.combine == "soft":
            return Decision(probs_TE, logits_TE, probs_TE, torch.ones_like(probs_TE, dtype=torch.bool))
        if config.combine == "threshold":
            return self._above(probs_TE, logits_TE, h_TD)
        if config.combine == "top_p":
            chosen_TE = _nucleus(probs_TE, config.top_p)
            gate_TE = weights_of_chosen(logits_TE, probs_TE, chosen_TE, config.renormalise)
            return Decision(gate_TE, logits_TE, probs_TE, chosen_TE)
        k = 1 if config.combine == "switch" else config.top_k
        index_TK = logits_TE.detach().topk(k, dim=-1).indices
        chosen_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter(1, index_TK, True)
        renormalise = config.renormalise and config.combine == "top_k"
        gate_TE = weights_of_chosen(logits_TE, probs_TE, chosen_TE, renormalise)
        if config.combine == "switch":
            gate_TE = gate_TE * self._room(index_TK, gate_TE)
        return Decision(gate_TE, logits_TE, probs_TE, chosen_TE, index_TK)

    def _above(self, probs_TE: Tensor, logits_TE: Tensor, h_TD: Tensor) -> Decision:
        bias_1 = self.threshold_bias.to(probs_TE.dtype)
        share_T1 = (wide_linear(h_TD, self.threshold_weight) + bias_1).sigmoid()
        over_TE = probs_TE - share_T1 * (self.here.config.max_threshold or 1 / self.here.num_experts)
        chosen_TE = over_TE.detach() >= 0
        weights_TE = over_TE.masked_fill(~chosen_TE, 0.0)
        sum_T1 = weights_TE.sum(-1, keepdim=True)
        gate_TE = weights_TE / sum_T1.masked_fill(sum_T1.detach() == 0, 1.0)
        return Decision(gate_TE, logits_TE, over_TE, chosen_TE)

    def _room(self, index_T1: Tensor, gate_TE: Tensor) -> Tensor:
        """[T,1] bool: the tokens that their expert has room for."""
        tokens, experts = gate_TE.shape
        if not tokens:
            return torch.ones_like(index_T1, dtype=torch.bool)
        mask_T = real_tokens(tokens)
        limit = capacity(tokens, experts, 1, self.here.config.capacity)
        wanted_T1 = None if mask_T is None else mask_T[:, None]
        return within_capacity(index_T1, gate_TE.gather(1, index_T1), experts, limit, wanted_TK=wanted_T1)

    def _states(self, tokens: int) -> Tensor:
        if self.first_pass is None:
            raise AdapterError(f"{self.path}: score: states needs the whole model; attach the bank to it")
        return self.first_pass.states(tokens, self.path)

    def _tasks(self, x_TM: Tensor) -> Tensor:
        """The embedding of each token's task, [T,D]. A task that there is none of must not pass for another one."""
        task_T, tasks = current().task_T, self.here.config.num_tasks
        if task_T is None:
            raise AdapterError(
                f"{self.path} routes by task, and the batch names none; give the data tasks, or use a preset that "
                "routes by tokens"
            )
        if task_T.shape[0] != x_TM.shape[0]:
            raise AdapterError(f"{self.path}: {task_T.shape[0]} tokens have a task, and {x_TM.shape[0]} are routed")
        is_TN = task_T[:, None] == torch.arange(tasks, device=task_T.device)
        known_T1 = is_TN.any(1, keepdim=True)
        mask_T = real_tokens(task_T.shape[0])
        if mask_T is not None:
            known_T1 = known_T1 | ~mask_T[:, None]
        if not task_T.is_cuda and not bool(known_T1.all()):
            raise AdapterError(f"{self.path}: num_tasks={tasks}, and a token is of task {int(task_T.max())}")
        h_TD = is_TN.to(self.task_embedding.dtype) @ self.task_embedding
        # Asking a GPU would wait for it; there the loss becomes NaN, which stops the run.
        return h_TD.masked_fill(~known_T1, torch.nan) if task_T.is_cuda else h_TD


def weights_of_chosen(logits_TE: Tensor, probs_TE: Tensor, chosen_TE: Tensor, renormalise: bool | None) -> Tensor:
    """Probabilities of chosen experts, made to sum to one with ``renormalise``; zero for the others."""
    # Softmax over the chosen logits is softmax over all, renormalised over the chosen; but the rest get a gradient of
    # exactly zero, where the quotient leaves rounding noise that Adam would scale up.
    if renormalise:
        return logits_TE.masked_fill(~chosen_TE, -torch.inf).softmax(-1)
    return probs_TE.masked_fill(~chosen_TE, 0.0)


def _nucleus(probs_TE: Tensor, share: float) -> Tensor:
    """Whether each expert is among the fewest of the most probable that have ``share`` together."""
    sorted_TE, order_TE = torch.sort(probs_TE.detach(), dim=-1, descending=True, stable=True)
    # A product: torch refuses running sums of fractions on a GPU in deterministic mode.
    rank_E = torch.arange(sorted_TE.shape[1], device=sorted_TE.device)
    before_TE = sorted_TE @ (rank_E[:, None] < rank_E).to(sorted_TE.dtype)
    kept_TE = before_TE < share
    kept_TE[:, :1] = True
    return torch.zeros_like(kept_TE).scatter(1, order_TE, kept_TE)


class _WideLinear(torch.autograd.Function):
    """``x W^T`` in fp32 or wider, which keeps x as it is instead of a wide copy of it."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, w_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, w_ED)
        dtype = torch.promote_types(torch.promote_types(x_TD.dtype, w_ED.dtype), torch.float32)
        return F.linear(x_TD.to(dtype), w_ED.to(dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy_TE: Tensor):
        x_TD, w_ED = ctx.saved_tensors
        dx_TD = (dy_TE @ w_ED.to(dy_TE.dtype)).to(x_TD.dtype) if ctx.needs_input_grad[0] else None
        dw_ED = (dy_TE.T @ x_TD.to(dy_TE.dtype)).to(w_ED.dtype) if ctx.needs_input_grad[1] else None
        return dx_TD, dw_ED


def wide_linear(x_TD: Tensor, w_ED: Tensor) -> Tensor:
    """``x W^T`` [T,E] in fp32 or wider."""
    return _WideLinear.apply(x_TD, w_ED)
