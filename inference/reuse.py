"""A policy that learns, while it runs, how soon each expert will be wanted again.

Shapes: L MoE layers, E experts of each, N of them used in one call, F features.
"""

from __future__ import annotations

import numpy as np

from inference.policies import Policy, Scores


class ExpectedReuse(Policy):
    """Evicts what is expected to be wanted again last, as Belady would with knowledge of the future.

    An expert's features are its rates of use, halved every 1, 4, 16, 64 and 512 rounds, and its share of the turns that
    came behind the experts used just now: all as logarithms. One logistic regression for the whole model turns them
    into the chance p that its layer's next turn wants it; it is fitted at every call, to what that call wanted, with
    step sizes of Adagrad. The next use is expected in ``1 / p`` rounds, counted from the layer's next turn. So nobody
    has to choose between recency, frequency and succession: the weights say how much of each this text needs.
    """

    HALF_LIVES = (1.0, 4.0, 16.0, 64.0, 512.0)
    STEP = 0.5
    SUCCESSION_HALF_LIFE = 256.0  # uses of an expert after which what followed it counts half
    _FLOOR = 0.01  # added to rates: the logarithm of an expert that was never used
    _DOUBT = 8.0  # uses that an expert's mean rate counts for, beside those that were seen to follow another expert

    def __init__(self, layers: int, experts: int) -> None:
        super().__init__(layers, experts)
        features = len(self.HALF_LIVES) + 2
        self._decay_F1 = 0.5 ** (1 / np.array(self.HALF_LIVES))[:, None]
        self._rate_LFE = np.zeros((layers, features - 2, experts))
        self._x_LFE = np.ones((layers, features, experts))  # the last feature is constant
        self._x_LFE[:, :-1] = np.log(self._FLOOR)
        self.weights_F = np.zeros(features)
        self.weights_F[2] = 1.0  # begin as LRFU with a half-life of 16
        self._squares_F = np.ones(features)
        self._chance_LE = np.full((layers, experts), 1e-3)
        self._followed_LEE = np.zeros((layers, experts, experts), dtype=np.float32)  # [l,a,b]: b behind a
        self._seen_LE1 = np.zeros((layers, experts, 1), dtype=np.float32)
        self._keep = np.float32(0.5 ** (1 / self.SUCCESSION_HALF_LIFE))
        self._before_L: list[np.ndarray | None] = [None] * layers

    def begin(self) -> None:
        self._before_L = [None] * self.layers

    def _note(self, row: int, experts_N: np.ndarray) -> None:
        used_E = np.zeros(self.experts)
        used_E[experts_N] = 1
        x_FE = self._x_LFE[row]
        gradient_F = x_FE @ (logistic(self.weights_F @ x_FE) - used_E)
        self._squares_F += gradient_F**2
        self.weights_F -= self.STEP * gradient_F / np.sqrt(self._squares_F)
        rate_FE = self._rate_LFE[row]
        rate_FE *= self._decay_F1
        rate_FE += (1 - self._decay_F1) * used_E
        x_FE[:-2] = np.log(rate_FE + self._FLOOR)
        x_FE[-2] = np.log(self._succession(row, experts_N, used_E) + self._FLOOR)
        self._chance_LE[row] = logistic(self.weights_F @ x_FE)

    def _succession(self, row: int, experts_N: np.ndarray, used_E: np.ndarray) -> np.ndarray:
        """Share of the turns behind the experts of this one that used each expert, [E]."""
        followed_EE, seen_E1 = self._followed_LEE[row], self._seen_LE1[row]
        before_N = self._before_L[row]
        if before_N is not None:
            followed_EE[before_N] = followed_EE[before_N] * self._keep + used_E
            seen_E1[before_N] = seen_E1[before_N] * self._keep + 1
        self._before_L[row] = experts_N
        mean_E = self._rate_LFE[row, -1]
        share_NE = (followed_EE[experts_N] + self._DOUBT * mean_E) / (seen_E1[experts_N] + self._DOUBT)
        return np.asarray(share_NE.mean(0))

    def scores(self) -> Scores:
        wait_L = (np.arange(self.layers) - self.row - 1) % self.layers
        return np.asarray(-1 / self._chance_LE - (wait_L / self.layers)[:, None])


def logistic(z: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(np.minimum(np.maximum(-z, -15), 15))))  # np.clip takes longer than the rest
