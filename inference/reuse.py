"""A policy that learns, while it runs, how soon each expert will be wanted again.

Shapes: L MoE layers, E experts of each, N of them used in one call, F features.
"""

from __future__ import annotations

import numpy as np

from inference.policies import Policy, Scores


class ExpectedReuse(Policy):
    """Evicts what is expected to be wanted again last, as Belady would with knowledge of the future.

    An expert's features are its rates of use, halved every 1, 4, 16, 64 and 512 rounds, as logarithms. One logistic
    regression for the whole model turns them into the chance p that its layer's next turn wants it; it is fitted at
    every call, to what that call wanted, with step sizes of Adagrad. The next use is expected in ``1 / p`` rounds,
    counted from the layer's next turn. So nobody has to choose between recency and frequency: the weights say how much
    of each this text needs.
    """

    HALF_LIVES = (1.0, 4.0, 16.0, 64.0, 512.0)
    STEP = 0.5
    _FLOOR = 0.01  # added to rates: the logarithm of an expert that was never used

    def __init__(self, layers: int, experts: int) -> None:
        super().__init__(layers, experts)
        features = len(self.HALF_LIVES) + 1
        self._decay_F1 = 0.5 ** (1 / np.array(self.HALF_LIVES))[:, None]
        self._rate_LFE = np.zeros((layers, features - 1, experts))
        self._x_LFE = np.ones((layers, features, experts))  # the last feature is constant
        self._x_LFE[:, :-1] = np.log(self._FLOOR)
        self.weights_F = np.zeros(features)
        self.weights_F[2] = 1.0  # begin as LRFU with a half-life of 16
        self._squares_F = np.ones(features)
        self._chance_LE = np.full((layers, experts), 1e-3)

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
        x_FE[:-1] = np.log(rate_FE + self._FLOOR)
        self._chance_LE[row] = logistic(self.weights_F @ x_FE)

    def scores(self) -> Scores:
        wait_L = (np.arange(self.layers) - self.row - 1) % self.layers
        return np.asarray(-1 / self._chance_LE - (wait_L / self.layers)[:, None])


def logistic(z: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-np.clip(z, -15, 15))))
