"""From logits to the next token."""

from __future__ import annotations

import torch
from torch import Tensor


def next_token(logits_V: Tensor, temperature: float, generator: torch.Generator | None) -> int:
    """Greedy (the lowest id among equals) at temperature 0, else a seeded draw from softmax(logits / temperature).

    Args:
        logits_V: scores of the vocabulary, one position.
        generator: a CPU generator; needed when temperature > 0. The draw is made on the CPU in fp32, so that a
            seed means the same on every device that yields the same logits.
    """
    if temperature == 0:
        return int(logits_V.argmax())
    assert generator is not None
    probabilities_V = torch.softmax(logits_V.float().cpu() / temperature, dim=-1)
    return int(torch.multinomial(probabilities_V, 1, generator=generator))
