"""How a family lays out its experts' weights, and what stands between the two projections."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertForm:
    """The defaults are most families': ``gate_up_proj`` [L,2I,H] with gate rows first, ``down_proj`` [L,H,I], and
    ``act(gate) * up`` between them.

    Attributes:
        transposed: ``gate_up_proj`` is [L,H,2I] and ``down_proj`` [L,I,H].
        interleaved: gate and up alternate along the 2I axis (gate first).
        act: the activation's name among transformers' ``ACT2FN``; ignored with ``limit``.
        limit: clamp gate from above and up on both sides at this, then ``(up + 1) * gate * sigmoid(alpha * gate)``
            (gpt_oss).
        alpha: see ``limit``.
    """

    transposed: bool = False
    interleaved: bool = False
    act: str = "silu"
    limit: float | None = None
    alpha: float = 1.702


PLAIN = ExpertForm()
