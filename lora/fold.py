"""Two ways through a weight with a low-rank pair, and how much of a layer to keep for its backward (no torch here).

Split: ``W x`` and ``s B (A x)``, added. Fold: ``(W + s B A) x``, with the sum in a buffer that is not kept. Splitting
costs by the row, folding by the expert, so folding pays for experts with very many rows. The gradients of A and B are
factored either way: a dense gradient of W is never built.
"""

from __future__ import annotations

import math
from typing import Literal

Way = Literal["auto", "split", "fold"]

# Of what a layer would hold that keeps its gathered rows, both halves' outputs and activations, and a second set of
# weights: so much is kept, and what is beyond it is computed again.
KEPT_SHARE = 0.24


def folds_above(way: Way, inputs: int, outputs: int, dropout: float = 0.0) -> float:
    """An expert with more rows than this has its weight [outputs, inputs] folded in the forward.

    Split costs ``2 N r (m + n)``, fold ``2 m n r``: equal at N = m n / (m + n), for any rank. Dropout is of the
    adapter's input alone, so with it nothing is folded.

    >>> folds_above("auto", 256, 256), folds_above("split", 256, 256), folds_above("fold", 256, 256, dropout=0.1)
    (128.0, inf, inf)
    """
    return _settled(way, inputs * outputs / (inputs + outputs), dropout)


def folds_back_above(way: Way, outputs: int, dropout: float = 0.0) -> float:
    """The same for the backward, where a fold saves only ``2 N r m``, of the gradient of x: A and B need the rest."""
    return _settled(way, float(outputs), dropout)


def _settled(way: Way, crossover: float, dropout: float) -> float:
    if dropout or way == "split":
        return math.inf
    return 0.0 if way == "fold" else crossover


def reason(way: Way, inputs: int, outputs: int, dropout: float) -> str:
    """For the user: how one stacked tensor's pair will run."""
    if dropout:
        return "split: its dropout is of the adapter's input alone"
    if way != "auto":
        return f"{way}: asked for"
    return f"split up to {folds_above(way, inputs, outputs):.0f} rows of an expert, folded beyond"


def kept_rows(pairs: int, rows: int, experts: int, hidden: int, inner: int, ranks: int) -> int:
    """How many of the sorted pairs' pre-activations [2I] to keep; those of the others are computed again.

    Args:
        pairs, rows: N pairs of R rows; the rows [R,H] themselves are kept anyway.
        experts: whose weights are here.
        ranks: of both tensors' pairs, added; each pair's products with A are kept, too.

    >>> kept_rows(2048, 256, 64, 256, 128, 16), kept_rows(4096, 1024, 16, 256, 384, 16)
    (2048, 3337)
    """
    whole = experts * 3 * hidden * inner + pairs * (hidden + 4 * inner)
    room = KEPT_SHARE * whole - rows * hidden - pairs * ranks
    return max(0, min(pairs, int(room // (2 * inner))))
