"""A router of a whole layer, asked once for a prompt (MiLoRA, arXiv 2410.18035): which of the layer's modules adapt.

Each adapted module is one expert, ``s B_m A_m``, and holds its own row of the router's weight, so that a place has all
that belongs to it. Before the decoder layer runs, what it is given is averaged over the prompt, goes through a GELU and
meets the rows; every token of the sample then has the same weights. The modules take them while the layer runs.

What the prompt is:

* in training and evaluation on chat, the tokens before the sample's first token with loss (``BatchContext.prompt_T``);
* without a batch that says so, all that a call is given; with a cache of keys and values, the call that fills it first.
  The weights are kept beside that cache, for the tokens that follow.

Some versions of transformers checkpoint a layer's ``forward``, others its call, so that in the recompute these hooks
run again or they do not. What was chosen is therefore kept in the batch's context until its backward is done.

Shapes: B rows, S positions, T = B*S tokens, Q samples that a row may hold, N = B*Q, D hidden size, E modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora.config import BankConfig
from lora.errors import AdapterError
from lora.factors import start_init
from lora.objectives import switch_loss
from lora.presets import layer_of
from lora.routers import weights_of_chosen, wide_linear
from moe.balance import inject
from moe.context import BatchContext, current
from moe.refs import TensorAddress


class PromptRow(nn.Module):
    """One module's row [1, D] of its layer's router.

    Args:
        path: of this module in the model, which ends in ``.adapter.router``.
        hidden: D, the width of the decoder layer's input.
    """

    def __init__(self, path: str, hidden: int, config: BankConfig, *, seed: int = 0, device=None, dtype=None) -> None:
        super().__init__()
        if not hidden:
            raise AdapterError(f"{path}: router: prompt needs the model's hidden_size, which its configuration lacks")
        self.path, self.config = path, config
        start = start_init((1, hidden), config.router_init, f"{seed}/{path}.weight")
        self.weight = nn.Parameter(start.to(device=device, dtype=dtype))
        self.weight.address = TensorAddress(f"{path}.weight", (1, hidden))
        self.gate_T1: Tensor | None = None

    def forward(self, tokens: int) -> Tensor:
        """The module's weight [T,1] for the tokens of this call. Raises AdapterError if the layer chose none."""
        gate_T1 = current().kept.get(self.path) if self.gate_T1 is None else self.gate_T1
        if gate_T1 is None:
            raise AdapterError(
                f"{self.path}: nobody chose for this prompt. The choice is made where the model calls its decoder "
                "layer; this caller runs the layer's parts without it, and cannot run banks with router: prompt"
            )
        if gate_T1.shape[0] != tokens:
            raise AdapterError(f"{self.path}: {gate_T1.shape[0]} tokens were weighed, and {tokens} came")
        return gate_T1


class LayerChoice:
    """Asks the rows of one bank's modules in one decoder layer, before the layer runs, and forgets after it.

    Args:
        path: of the decoder layer, ``layer`` itself.
        rows: of its modules, in the order of their places.
    """

    def __init__(self, path: str, layer: nn.Module, rows: Sequence[PromptRow]) -> None:
        self.path, self.number, self.rows, self.config = path, layer_of(f"{path}."), tuple(rows), rows[0].config
        self._kept: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()  # of each cache the weights [B,E]
        layer.register_forward_pre_hook(self._before, with_kwargs=True)
        # Also when the layer raises, as it does when checkpointing has recomputed all that it needs.
        layer.register_forward_hook(self._after, always_call=True)

    def _before(self, _layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not current().adapted:
            return
        x_BSD = args[0] if args else kwargs["hidden_states"]
        gate_TE = self._gates(x_BSD, kwargs.get("past_key_values"))
        for i, row in enumerate(self.rows):
            row.gate_T1 = gate_TE[:, i : i + 1]
            if current().balance:  # a batch that is trained on, not the evaluations' common context
                current().kept[row.path] = row.gate_T1

    def _after(self, *_: Any) -> None:
        for row in self.rows:
            row.gate_T1 = None

    def _gates(self, x_BSD: Tensor, cache: Any) -> Tensor:
        context, (rows, length, _) = current(), x_BSD.shape
        if context.prompt_T is not None:
            return self._of_batch(x_BSD, context)
        if cache is not None and cache.get_seq_length(self.number) > 0:
            gate_BE = self._kept.get(cache)
            if gate_BE is None or gate_BE.shape[0] != rows:
                raise AdapterError(
                    f"{self.path}: the prompt's weights are not known for this cache of keys and values, which was "
                    "filled without this adapter or rearranged since; run the prompt again"
                )
        else:
            weight_BQS = x_BSD.new_full((rows, 1, length), 1 / max(1, length), dtype=_wide(x_BSD.dtype))
            gate_BE = self._choose(x_BSD, weight_BQS, None, context)
            if cache is not None:
                self._kept[cache] = gate_BE.detach()
        return gate_BE.unsqueeze(1).expand(-1, length, -1).reshape(rows * length, -1)

    def _of_batch(self, x_BSD: Tensor, context: BatchContext) -> Tensor:
        rows, length, _ = x_BSD.shape
        if context.prompt_T.shape[0] != rows * length:
            raise AdapterError(f"{self.path}: prompts of {context.prompt_T.shape[0]} tokens, and {rows * length} came")
        prompt_BS, wide = context.prompt_T.view(rows, length), _wide(x_BSD.dtype)
        if context.segment_T is None:
            is_BQS, of_BSQ = prompt_BS.unsqueeze(1), None
        else:
            if context.samples is None:
                raise AdapterError(f"{self.path}: rows are packed, and the batch does not say with how many samples")
            sample_Q = torch.arange(context.samples, device=x_BSD.device)
            of_BSQ = context.segment_T.view(rows, length, 1) == sample_Q
            is_BQS = (of_BSQ & prompt_BS.unsqueeze(-1)).transpose(1, 2)
        count_BQ1 = is_BQS.sum(-1, keepdim=True)
        weight_BQS = is_BQS.to(wide) / count_BQ1.clamp(min=1)
        gate_NE = self._choose(x_BSD, weight_BQS, (count_BQ1 > 0).flatten(), context)
        if of_BSQ is None:
            return gate_NE.unsqueeze(1).expand(-1, length, -1).reshape(rows * length, -1)
        # A product, not a gather, whose gradient would be added up in any order on a GPU.
        gate_BQE = gate_NE.unflatten(0, (rows, context.samples))
        return (of_BSQ.to(wide) @ gate_BQE).flatten(0, 1)

    def _choose(self, x_BSD: Tensor, weight_BQS: Tensor, used_N: Tensor | None, context: BatchContext) -> Tensor:
        """Weights [N,E] of the modules for each sample; the balance loss reaches backward through them.

        Args:
            weight_BQS: of each token in its sample's mean.
            used_N: samples that are there; None: all.
        """
        config, weight_ED = self.config, torch.cat([row.weight for row in self.rows])
        pooled_ND = (weight_BQS @ x_BSD.to(weight_BQS.dtype)).flatten(0, 1)
        logits_NE = wide_linear(F.gelu(pooled_ND), weight_ED)
        probs_NE = logits_NE.softmax(-1)
        if config.combine == "soft":
            return probs_NE
        index_NK = logits_NE.detach().topk(config.top_k, dim=-1).indices
        chosen_NE = torch.zeros_like(logits_NE, dtype=torch.bool).scatter(1, index_NK, True)
        gate_NE = weights_of_chosen(logits_NE, probs_NE, chosen_NE, config.renormalise)
        wanted = context.balance and config.balance == "switch" and config.router_aux_loss_coef
        if wanted and torch.is_grad_enabled() and len(gate_NE):
            loss = switch_loss(probs_NE, chosen_NE, used_N) / config.top_k
            gate_NE = inject(gate_NE, config.router_aux_loss_coef * loss)
        return gate_NE


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def join_layers(model: nn.Module, places: Iterable[tuple[str, str]]) -> None:
    """Let the rows of each bank in each decoder layer choose together.

    Args:
        places: (bank, path of an adapted linear layer), in the order of the banks' places; others are passed over.
    """
    joined: dict[tuple[str, str], list[PromptRow]] = {}
    for bank, path in places:
        row = getattr(getattr(model.get_submodule(path), "adapter", None), "router", None)
        if isinstance(row, PromptRow):
            joined.setdefault((bank, decoder_layer(path)), []).append(row)
    for (_, path), rows in joined.items():
        LayerChoice(path, model.get_submodule(path), rows)


def decoder_layer(path: str) -> str:
    """The decoder layer that a module is in.

    >>> decoder_layer("model.layers.3.self_attn.q_proj")
    'model.layers.3'
    """
    before, number = path.split(f".{layer_of(path)}.", 1)[0], layer_of(path)
    return f"{before}.{number}"
