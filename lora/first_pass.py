"""A first pass through the model without its adapters, for routers that look at the base model's last states.

It runs before the model does, on the same tokens, without gradients and caches. Statistics, losses, records and replays
of routing are those of the second pass alone; with expert parallelism every rank runs both. Recomputed layers take the
states that were kept in the batch's context: checkpointing runs layers again, never the model.

Shapes: B rows, S positions, T = B*S tokens, D hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lora.errors import AdapterError
from moe.context import batch_context, current

_INPUTS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position")
_KEY = "states of the first pass"


class FirstPass:
    """Put on a causal language model of transformers; :meth:`states` has the last hidden states while it runs."""

    def __init__(self, model: nn.Module) -> None:
        if not hasattr(model, "base_model"):
            raise AdapterError(f"score: states needs a model of transformers, not {type(model).__name__}")
        self._names = tuple(inspect.signature(model.forward).parameters)
        self._states_TD: Tensor | None = None
        model.register_forward_pre_hook(self._before, with_kwargs=True)
        model.register_forward_hook(self._after, always_call=True)

    def states(self, tokens: int, asking: str) -> Tensor:
        """[T, D], without gradient. Raises AdapterError, naming who asks, if no pass ran or it had other tokens."""
        states_TD = current().kept.get(_KEY) if self._states_TD is None else self._states_TD
        if states_TD is None:
            raise AdapterError(f"{asking}: there was no first pass; call the model, not its layers")
        if len(states_TD) != tokens:
            raise AdapterError(f"{asking}: the first pass had {len(states_TD)} tokens, and {tokens} came")
        return states_TD

    def _before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not current().adapted:
            return
        given = dict(zip(self._names, args, strict=False)) | kwargs
        cache = given.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            raise AdapterError(
                "this adapter runs the model twice, and its first pass has no cache of keys and values; generate with "
                "use_cache=False"
            )
        inputs = {name: given[name] for name in _INPUTS if given.get(name) is not None}
        alone = replace(current(), adapted=False, balance=False, record=None, replay=None, kept={})
        with torch.no_grad(), batch_context(alone):
            states_BSD = model.base_model(**inputs, use_cache=False).last_hidden_state
        self._states_TD = states_BSD.flatten(0, 1)
        if current().balance:  # a batch that is trained on, not the evaluations' common context
            current().kept[_KEY] = self._states_TD

    def _after(self, *_: Any) -> None:
        self._states_TD = None


def run_first(model: nn.Module, routers: Iterable[Any]) -> None:
    """Give ``routers`` a first pass through ``model``, if there are any."""
    routers = list(routers)
    if routers:
        first = FirstPass(model)
        for router in routers:
            router.first_pass = first
