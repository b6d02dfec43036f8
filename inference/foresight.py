"""A policy that weighs what trained lookahead heads say with what was used of late.

Shapes: L MoE layers, E experts of each, N of them used in one call, F features, 2 horizons.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from inference.policies import Scores
from inference.reuse import ExpectedReuse, logistic

HORIZONS = (1, 4)  # turns of an expert's layer within which heads say that it will be used


class ForeseenReuse(ExpectedReuse):
    """Keeps what will be used in its layer's next turn, or at least within four.

    Heads (:mod:`inference.heads`) give for each layer call the log odds of both events, for all experts of the
    model. A logistic regression for each horizon adds them to the rates of use that :class:`ExpectedReuse` has; it is
    fitted while it runs, once it has turned out what was used. An expert's score is the sum of the two chances. One
    horizon alone is worse: the next turn tells nothing of an expert that is needed in the turn after, and to keep many
    experts is to keep them for longer than a turn (docs/measurements.md). Without heads it is ExpectedReuse.
    """

    uses_heads = True

    def __init__(self, layers: int, experts: int) -> None:
        super().__init__(layers, experts)
        features = len(self.weights_F) + 1
        self._ahead_2LE: np.ndarray | None = None  # of the newest call
        self._told_2LE: np.ndarray | None = None  # of the coming one
        self._scores_LE: Scores | None = None
        self._own_LE = np.full((layers, experts), np.nan)  # what each layer's last call said of its next turn
        self._last_LE = np.full((layers, experts), -np.inf)  # turn of the last use
        self._turn_L = np.zeros(layers, dtype=int)
        # (turn, features) of calls of which it is not known yet what was used within the longer horizon
        self._due: list[deque[tuple[int, np.ndarray]]] = [deque() for _ in range(layers)]
        self.head_weights_2F = np.zeros((2, features))
        self.head_weights_2F[:, -1] = 1.0  # begin by believing the heads
        self._head_squares_2F = np.ones((2, features))

    def foresee(self, ahead_2LE: np.ndarray) -> None:
        self._told_2LE = np.clip(ahead_2LE, -8.0, 8.0)

    def _note(self, row: int, experts_N: np.ndarray) -> None:
        before_2LE, self._ahead_2LE, self._told_2LE = self._ahead_2LE, self._told_2LE, None
        self._scores_LE = None
        used_E = np.zeros(self.experts)
        used_E[experts_N] = 1
        if before_2LE is not None:
            self._fit_head(0, self._with_head(row, before_2LE[0, row]), used_E)
        if not np.isnan(self._own_LE[row, 0]):
            self._fit_head(0, self._with_head(row, self._own_LE[row]), used_E)
        turn = self._turn_L[row] = self._turn_L[row] + 1
        self._last_LE[row, experts_N] = turn
        due = self._due[row]
        while due and due[0][0] + HORIZONS[1] <= turn:
            since, x_FE = due.popleft()
            self._fit_head(1, x_FE, (self._last_LE[row] > since).astype(float))
        super()._note(row, experts_N)
        if self._ahead_2LE is None:
            self._own_LE[row] = np.nan
        else:
            self._own_LE[row] = self._ahead_2LE[0, row]
            due.append((turn, self._with_head(row, self._ahead_2LE[1, row])))

    def _with_head(self, row: int, head_E: np.ndarray) -> np.ndarray:
        return np.concatenate([self._x_LFE[row], head_E[None]])

    def _fit_head(self, horizon: int, x_FE: np.ndarray, came_E: np.ndarray) -> None:
        gradient_F = x_FE @ (logistic(self.head_weights_2F[horizon] @ x_FE) - came_E)
        self._head_squares_2F[horizon] += gradient_F**2
        self.head_weights_2F[horizon] -= self.STEP * gradient_F / np.sqrt(self._head_squares_2F[horizon])

    def chances(self) -> np.ndarray:
        """[2,L,E]: how likely each expert is used within each horizon. Needs heads' word on the newest call."""
        assert self._ahead_2LE is not None
        rates_L2E = self.head_weights_2F[:, :-1] @ self._x_LFE
        return logistic(rates_L2E.swapaxes(0, 1) + self.head_weights_2F[:, -1, None, None] * self._ahead_2LE)

    def scores(self) -> Scores:
        if self._ahead_2LE is None:
            return super().scores()
        if self._scores_LE is None:  # a shadow and the cache itself ask for the same
            self._scores_LE = np.asarray(self.chances().sum(0))
        return self._scores_LE
