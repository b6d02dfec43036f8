"""``planaria generate``: continue a prompt with the offloaded runtime."""

from __future__ import annotations

import sys

from inference.engine import LLM
from inference.store import InferenceError
from lora.errors import AdapterError


def main(
    model_dir: str,
    prompt: str,
    adapter: str | None,
    max_new_tokens: int,
    expert_budget: float | None,
    vram: int | None = None,
    report: bool = False,
) -> int:
    """Prints the prompt's continuation, then one line of figures. Returns 0, or 2 for a user's mistake."""
    try:
        llm = LLM(model_dir, 1.0 if expert_budget is None else expert_budget, adapter, vram=vram)
        (generation,) = llm.generate([prompt], max_new_tokens)
    except (InferenceError, AdapterError) as error:
        print(f"planaria generate: {error}", file=sys.stderr)
        return 2
    print(generation.text)
    print(llm.stats())
    if report:
        print(llm.report())
    return 0
