"""How `planaria generate`, `serve` and `chat` open a model, as a value. No torch before it is opened."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inference.engine import LLM


@dataclass(frozen=True)
class Runtime:
    """What the command line says of memory and of the way of experts; see :class:`inference.engine.LLM`.

    Attributes:
        expert_budget: share of the experts; None: all, or what ``vram`` has room for.
        vram: bytes, in place of ``expert_budget``.
        prefetch, no_pin, no_pack, cpu_experts: see :class:`inference.offload.Crossing`.
        trace: file to make, in which routing is recorded; ``LLM.close`` ends it.
        graphs: capture decode steps; None: where they can be.
    """

    expert_budget: float | None = None
    vram: int | None = None
    kv_tokens: int | None = None
    prefetch: str = "none"
    no_pin: bool = False
    no_pack: bool = False
    cpu_experts: bool = False
    trace: str | None = None
    graphs: bool | None = None

    def open(self, model_dir: str, **more: Any) -> LLM:
        """``more`` goes to LLM as it is. Says on stderr whether steps are captured and experts packed.

        Raises what LLM raises.
        """
        from inference.engine import LLM
        from inference.offload import Crossing

        share = 1.0 if self.expert_budget is None else self.expert_budget
        crossing = Crossing(self.prefetch, pin=not self.no_pin, pack=not self.no_pack, cpu=self.cpu_experts)
        size: dict[str, Any] = {"kv_tokens": self.kv_tokens, "vram": self.vram}
        llm = LLM(model_dir, share, crossing=crossing, trace=self.trace, graphs=self.graphs, **size, **more)
        for said in filter(None, (llm.decoding, llm.packing)):
            print(said, file=sys.stderr)
        return llm
