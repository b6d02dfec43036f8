"""Tables of rotations, taken from transformers' own rotary modules, so that every variant is theirs.

Shapes: P positions, R rows, D rotated numbers of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from inference.errors import InferenceError

_STATEFUL = ("dynamic", "longrope")


class RopeTable:
    """cos and sin of every position so far, extended by doubling.

    A pair (x1, x2) becomes ``(x1 cos - x2 sin, x2 cos + x1 sin)``, computed as ``x * cos + swapped(x) * sin`` with the
    minus kept in the table's sin.

    Args:
        rotary: a transformers rotary module, which gives cos and sin of D or D/2 numbers, or complex rotations.
        width: D.
        interleaved: the two numbers of a pair are neighbours (:func:`rotated_pairs`), not D/2 apart (:func:`rotated`).

    Raises:
        InferenceError: rotations depend on the length of the text, so that sequences could not share a table.
    """

    def __init__(
        self,
        rotary: nn.Module,
        width: int,
        *,
        interleaved: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        kind = getattr(rotary, "rope_type", "default")
        if kind in _STATEFUL:
            raise InferenceError(
                f"rope_type {kind!r} is not served: its rotations change with the length of the text, so keys that are "
                "kept would not fit; use a model with rope_type default, linear, llama3 or yarn"
            )
        self._rotary, self._width, self._interleaved = rotary, width, interleaved
        self._like = torch.empty(0, device=device, dtype=dtype)
        self._cos_PD, self._sin_PD = self._made(256)

    def rows(self, position_R: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """cos and sin [R,1,D]; ``longest`` is above every position."""
        cos_PD, sin_PD = self.tables(longest)
        return cos_PD[position_R, None], sin_PD[position_R, None]

    def tables(self, longest: int) -> tuple[Tensor, Tensor]:
        """cos and sin [P,D] of ``longest`` positions or more."""
        while longest > len(self._cos_PD):
            self._cos_PD, self._sin_PD = self._made(2 * len(self._cos_PD))
        return self._cos_PD, self._sin_PD

    def _made(self, positions: int) -> tuple[Tensor, Tensor]:
        made = self._rotary(self._like, torch.arange(positions, device=self._like.device)[None])
        if isinstance(made, Tensor):  # complex
            made = made.real.to(self._like.dtype), made.imag.to(self._like.dtype)
        half = self._width // 2
        cos, sin = (part[0, :, :half] for part in made)
        assert cos.shape[-1] == half, f"{type(self._rotary).__name__}: {cos.shape} of {half} angles"
        if self._interleaved:
            return cos.repeat_interleave(2, -1), torch.stack([-sin, sin], -1).flatten(-2)
        return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotated(x_RHD: Tensor, cos_R1D: Tensor, sin_R1D: Tensor) -> Tensor:
    """Heads in which a pair's numbers are D/2 apart."""
    return torch.addcmul(x_RHD * cos_R1D, x_RHD.roll(x_RHD.shape[-1] // 2, -1), sin_R1D)


def rotated_pairs(x_RHD: Tensor, cos_R1D: Tensor, sin_R1D: Tensor) -> Tensor:
    """Heads in which a pair's numbers are neighbours."""
    swapped_RHD = x_RHD.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x_RHD * cos_R1D, swapped_RHD, sin_R1D)
