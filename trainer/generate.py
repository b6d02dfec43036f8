"""``planaria generate``: continue a prompt with the offloaded runtime."""

from __future__ import annotations

import sys
from typing import Any

from inference.engine import LLM
from inference.errors import InferenceError
from inference.offload import Crossing
from lora.errors import AdapterError

_OF_DRAWS = ("top_k", "top_p", "min_p", "seed")


def main(
    model_dir: str,
    prompt: str,
    adapter: str | None,
    max_new_tokens: int,
    expert_budget: float | None,
    *,
    vram: int | None = None,
    report: bool = False,
    kv_tokens: int | None = None,
    trace: str | None = None,
    prefetch: str = "none",
    pin: bool = True,
    cpu_experts: bool = False,
    graphs: bool = False,
    **settings: Any,
) -> int:
    """Prints the prompt's continuation, then one line of figures. Returns 0, or 2 for a user's mistake.

    One of ``expert_budget`` and ``vram`` (bytes) at most; ``report`` prints what bound it; ``trace`` is a file to make.
    ``prefetch``, ``pin`` and ``cpu_experts``: see :class:`inference.offload.Crossing`; ``graphs``: see
    :class:`inference.engine.LLM`. ``settings`` are those of :class:`inference.requests.SamplingParams`.
    """
    try:
        if (idle := [name for name in _OF_DRAWS if name in settings]) and not settings.get("temperature"):
            raise InferenceError(f"{idle[0]} changes nothing at temperature 0; give a temperature above 0, as 0.8")
        share = 1.0 if expert_budget is None else expert_budget
        crossing = Crossing(prefetch, pin=pin, cpu=cpu_experts)
        size: dict[str, Any] = {"kv_tokens": kv_tokens, "vram": vram}
        with LLM(model_dir, share, adapter, crossing=crossing, trace=trace, graphs=graphs, **size) as llm:
            (generation,) = llm.generate([prompt], max_new_tokens, **settings)
    except (InferenceError, AdapterError) as error:
        print(f"planaria generate: {error}", file=sys.stderr)
        return 2
    print(generation.text)
    print(llm.stats())
    if report:
        print(llm.report())
    return 0
