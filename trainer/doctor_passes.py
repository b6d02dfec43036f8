"""One forward and backward pass over random tokens, seen at every MoE block, and comparisons of two of them.

Shapes: B sequences, S positions, V vocabulary, T tokens, K choices per token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe.context import BatchContext, batch_context
from moe.families import MoEBlock

Named = Sequence[tuple[str, nn.Parameter]]


@dataclass(frozen=True)
class Pass:
    """What one pass gave.

    Attributes:
        index: the choices [T,K] of each layer, as the experts were called with them.
        outputs: what each layer's MoE block returned.
        grads: by the parameter's name; without those that got none.
    """

    logits_BSV: Tensor
    index: dict[int, Tensor]
    outputs: dict[int, Tensor]
    grads: dict[str, Tensor]


def random_tokens(config: Any, num_experts: int, top_k: int, copies: int = 64, seed: int = 0) -> Tensor:
    """Token ids [B,S], enough for ``copies`` tokens to each expert if they are spread evenly."""
    wanted = max(256, -(-copies * num_experts // top_k))
    length = min(64, int(getattr(config, "max_position_embeddings", 64)))
    shape = (-(-wanted // length), length)
    return torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def run_pass(
    model: nn.Module,
    blocks: Iterable[MoEBlock],
    named: Named,
    ids_BS: Tensor,
    replay: Mapping[int, Tensor] | None = None,
    training: bool = False,
) -> Pass:
    """Forward and backward of the next-token loss; gradients are taken off the parameters.

    Args:
        replay: the indices that each layer must choose, if its own choice is not wanted.
        training: whether the model is to do what it does in training only.
    """
    index: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}
    hooks = []
    for block in blocks:

        def called(_module: nn.Module, args: tuple, kwargs: dict[str, Any], layer: int = block.layer) -> None:
            index[layer] = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]

        def returned(_module: nn.Module, _args: tuple, output: Any, layer: int = block.layer) -> None:
            outputs[layer] = (output[0] if isinstance(output, tuple) else output).detach().float()

        hooks.append(block.module.experts.register_forward_pre_hook(called, with_kwargs=True))
        hooks.append(block.module.register_forward_hook(returned))
    model.zero_grad(set_to_none=True)
    model.train(training)
    context = BatchContext(balance=False, replay=replay.get if replay is not None else None)
    try:
        with batch_context(context):
            result = model(input_ids=ids_BS, labels=ids_BS, use_cache=False)
            result.loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    grads = {name: p.grad for name, p in named if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return Pass(result.logits.detach().float(), index, outputs, grads)


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters only: rotary frequencies and correction biases are buffers, and stay as they are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def distance(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of ``want``, in fp64; 0.0 if both are zero."""
    return _ratio([got], [want])


def grad_distance(got: Mapping[str, Tensor], want: Mapping[str, Tensor], names: Iterable[str]) -> float:
    """The same over all gradients of ``names`` together; one that is not there counts as zero."""
    pairs = [(got.get(name, torch.zeros_like(want[name]) if name in want else None), want.get(name)) for name in names]
    known = [(g, torch.zeros_like(g) if w is None else w) for g, w in pairs if g is not None]
    return _ratio([g for g, _ in known], [w for _, w in known])


def _ratio(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    difference = sum(float((g.double() - w.double()).square().sum()) for g, w in zip(got, want, strict=True)) ** 0.5
    norm = sum(float(w.double().square().sum()) for w in want) ** 0.5
    return difference / norm if norm else (0.0 if not difference else float("inf"))
