"""Two ways through a weight with a low-rank pair, and how much of a layer to keep for its backward (no torch here).

Split: ``W x`` and ``s B (A x)``, added. Fold: ``(W + s B A) x``, with the sum in a buffer that is not kept. Splitting
costs by the row, folding by the expert, so folding pays for experts with very many rows. The gradients of A and B are
factored either way: a dense gradient of W is never built.
"""

from __future__ import annotations

from typing import Literal

Way = Literal["auto", "split", "fold"]

# Of what a layer would hold that keeps its gathered rows, both halves' outputs and activations, and a second set of
# weights: so much is kept, and what is beyond it is computed again.
KEPT_SHARE = 0.24


def fold_from(inputs: int, outputs: int) -> int:
    """Rows of an expert from which folding its weight [outputs, inputs] is cheaper in the forward.

    Split costs ``2 N r (m + n)``, fold ``2 m n r``: equal at N = m n / (m + n), for any rank.

    >>> fold_from(256, 256), fold_from(2048, 1536)
    (128, 878)
    """
    return -(-inputs * outputs // (inputs + outputs))


def fold_back_from(outputs: int) -> int:
    """The same for the backward, where a fold saves only ``2 N r m``, of the gradient of x: A and B need the rest."""
    return outputs


def folds(way: Way, rows: float, threshold: int, dropout: float = 0.0) -> bool:
    """Whether an expert's weight is folded. Dropout is of the adapter's input alone, so there it never is."""
    if dropout:
        return False
    return way == "fold" or (way == "auto" and rows > threshold)


def reason(way: Way, inputs: int, outputs: int, dropout: float) -> str:
    """For the user: how one stacked tensor's pair will run."""
    if dropout:
        return "split: its dropout is of the adapter's input alone"
    if way != "auto":
        return f"{way}: asked for"
    return f"split up to {fold_from(inputs, outputs)} rows of an expert, folded beyond"


def kept_rows(pairs: int, rows: int, experts: int, hidden: int, inner: int) -> int:
    """How many of the sorted pairs' pre-activations [2I] to keep; those of the others are computed again.

    Args:
        pairs, rows: N pairs of R rows; the rows [R,H] themselves are kept anyway.
        experts: whose weights are here.

    >>> kept_rows(2048, 256, 64, 256, 128), kept_rows(4096, 1024, 16, 256, 384)
    (2048, 3422)
    """
    whole = experts * 3 * hidden * inner + pairs * (hidden + 4 * inner)
    room = KEPT_SHARE * whole - rows * hidden
    return max(0, min(pairs, int(room // (2 * inner))))
