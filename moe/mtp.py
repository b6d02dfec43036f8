"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2): a head that is trained and left behind.

Module k (1..D) combines what it knows of position i with the embedding of token i+k, runs one transformer block of
the model's own kind, and predicts token i+k+1 through the model's output head::

    h'_i = M_k [RMSNorm(h^(k-1)_i); RMSNorm(Emb(t_(i+k)))]    h^k = Block_k(h')    P(t_(i+k+1)) = Head(RMSNorm(h^k_i))

h^0 is what the model's own head reads. Embedding and head are shared. The mean of the D cross-entropies, times a
weight, is added to the model's loss when it trains, by hooks: transformers' forward is not touched. A block runs over
all S positions, so that a batch has one shape in every layer: those after which no token i+k is left get the last one,
see no loss and, attention being causal, are seen by none. They do count in routing statistics and balance losses.

Shapes: B sequences, S positions, H hidden, V vocabulary, D modules.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from moe.convert import assign_addresses, convert
from moe.families import MoEBlock, find_moe_blocks
from moe.layout import Layout

PREFIX = "mtp."  # of its parameters' paths; transformers' classes have no such tensors
_IGNORED = -100  # transformers' label of a position without loss


class PredictionModule(nn.Module):
    """M_k, its norms, and its block, as layer ``layer`` of the model. Weights as the family initialises them."""

    def __init__(self, model: PreTrainedModel, layer: int) -> None:
        super().__init__()
        config, last = model.config, model.base_model.layers[-1]
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.state_norm = nn.RMSNorm(hidden, eps)
        self.embedding_norm = nn.RMSNorm(hidden, eps)
        self.projection = nn.Linear(2 * hidden, hidden, bias=False)
        # The last layer's number makes a layer of the last layer's kind; without a cache it is used for nothing else.
        self.block = type(last)(config, config.num_hidden_layers - 1)
        self.norm = nn.RMSNorm(hidden, eps)
        self.layer = layer
        nn.init.normal_(self.projection.weight, std=config.initializer_range)
        self.block.apply(model._init_weights)

    def forward(self, h_BSH: Tensor, embedding_BSH: Tensor, call: dict[str, Any]) -> Tensor:
        """``call``: the arguments that the model's last layer got (positions, mask)."""
        both_BS2H = torch.cat([self.state_norm(h_BSH), self.embedding_norm(embedding_BSH)], -1)
        out = self.block(self.projection(both_BS2H), **call)
        return out[0] if isinstance(out, tuple) else out


def attach_mtp(
    model: PreTrainedModel, depth: int, weight: float, *, seed: int, layout: Layout | None = None, rank: int = 0
) -> list[MoEBlock]:
    """Add ``depth`` modules to ``model``; its training loss becomes loss + ``weight`` times the mean of theirs.

    Their layer numbers follow the model's last. Returns their MoE blocks, converted like the model's; none, if the
    model's last layer is dense. The seed alone decides the weights, on every rank.
    """
    assert depth >= 1
    count = model.config.num_hidden_layers
    digest = hashlib.sha256(f"{seed}:mtp".encode()).digest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(digest[:7], "little"))
        modules = nn.ModuleDict({str(count + k): PredictionModule(model, count + k) for k in range(depth)})
    for parameter in modules.parameters():
        parameter.data = parameter.data.to(next(model.parameters()).dtype)
    alone = nn.Module()  # so that paths begin as they will in the model
    alone.mtp = modules
    last = model.base_model.layers[-1]
    has_experts = any(block.module in set(last.modules()) for block in find_moe_blocks(model))
    blocks = convert(alone, layout, rank) if has_experts else []
    assign_addresses(alone)
    model.mtp = modules
    _Hooks(model, weight)
    return blocks


class _Hooks:
    """Watches one forward pass of the model and adds to its loss. Only in training, and only if labels are given."""

    def __init__(self, model: PreTrainedModel, weight: float) -> None:
        self.weight = weight
        self.watching = False
        self.call: dict[str, Any] | None = None
        self.h_BSH: Tensor | None = None
        model.register_forward_pre_hook(self._begin)
        # The layer may run again, when activation checkpointing recomputes it; what it is called with stays the same.
        model.base_model.layers[-1].register_forward_pre_hook(self._note_call, with_kwargs=True)
        model.base_model.register_forward_hook(self._note_states)
        model.register_forward_hook(self._add_loss, with_kwargs=True)

    def _begin(self, model: nn.Module, _args: Any) -> None:
        self.watching = model.training

    def _note_call(self, _layer: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        if self.watching:
            cache = ("past_key_values", "past_key_value", "use_cache")
            self.call = {name: value for name, value in kwargs.items() if name not in cache}

    def _note_states(self, _base: nn.Module, _args: Any, output: Any) -> None:
        if self.watching:
            self.h_BSH = output.last_hidden_state

    def _add_loss(self, model: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        call, h_BSH, watching = self.call, self.h_BSH, self.watching
        self.call, self.h_BSH, self.watching = None, None, False
        labels_BS = kwargs.get("labels")
        if not watching or labels_BS is None:
            return output
        assert call is not None, "the model's last layer did not run"
        assert h_BSH is not None
        ids_BS = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        losses = prediction_losses(model, h_BSH, ids_BS, labels_BS, call, kwargs.get("attention_mask"))
        output.loss = output.loss + self.weight * torch.stack(losses).mean()
        return output


def prediction_losses(
    model: Any, h_BSH: Tensor, ids_BS: Tensor, labels_BS: Tensor, call: dict[str, Any], mask_BS: Tensor | None
) -> list[Tensor]:
    """Each module's mean cross-entropy, in nats, fp32.

    Args:
        labels_BS: tokens, -100 where none is to be predicted.
        mask_BS: 0 for padding, which is neither predicted nor predicted from.
    """
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    if mask_BS is not None and mask_BS.dim() == 2:
        labels_BS = labels_BS.masked_fill(mask_BS == 0, _IGNORED)
    losses = []
    for k, module in enumerate(model.mtp.values(), 1):
        h_BSH = module(h_BSH, embed(_ahead(ids_BS, k)), call)
        targets_BS = labels_BS[:, k + 1 :]
        if mask_BS is not None and mask_BS.dim() == 2:
            targets_BS = targets_BS.masked_fill(mask_BS[:, : targets_BS.shape[1]] == 0, _IGNORED)
        logits_BSV = head(module.norm(h_BSH[:, : targets_BS.shape[1]])).float()
        total = F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten(), ignore_index=_IGNORED, reduction="sum")
        losses.append(total / (targets_BS != _IGNORED).sum().clamp(min=1))
    return losses


def _ahead(ids_BS: Tensor, k: int) -> Tensor:
    """Token i+k at position i; the last token where there is none."""
    end = ids_BS.shape[1] - 1
    return ids_BS[:, (torch.arange(end + 1, device=ids_BS.device) + k).clamp(max=end)]
