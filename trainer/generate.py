"""``planaria generate``: continue a prompt with the offloaded runtime."""

from __future__ import annotations

import sys
from typing import Any

from inference.errors import InferenceError
from inference.runtime import Runtime
from lora.errors import AdapterError

_OF_DRAWS = ("top_k", "top_p", "min_p", "seed")


def main(
    model_dir: str,
    prompt: str,
    adapter: str | None,
    max_new_tokens: int,
    runtime: Runtime,
    *,
    report: bool = False,
    **settings: Any,
) -> int:
    """Prints the prompt's continuation, then one line of figures. Returns 0, or 2 for a user's mistake.

    ``report`` prints what bound it. ``settings`` are those of :class:`inference.requests.SamplingParams`.
    """
    try:
        if (idle := [name for name in _OF_DRAWS if name in settings]) and not settings.get("temperature"):
            raise InferenceError(f"{idle[0]} changes nothing at temperature 0; give a temperature above 0, as 0.8")
        with runtime.open(model_dir, adapter=adapter) as llm:
            (generation,) = llm.generate([prompt], max_new_tokens, **settings)
    except (InferenceError, AdapterError) as error:
        print(f"planaria generate: {error}", file=sys.stderr)
        return 2
    print(generation.text)
    print(llm.stats())
    if report:
        print(llm.stats() if llm.cache is None else llm.report())
    return 0
