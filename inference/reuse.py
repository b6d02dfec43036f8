"""A policy that learns, while it runs, how soon each expert will be wanted again.

Shapes: L MoE layers, E experts of each, N of them used in one call, F features.
"""

from __future__ import annotations

import ctypes

import numpy as np

from inference.native import opened
from inference.policies import Policy, Scores


class _Constants(ctypes.Structure):
    """What calls of the compiled routine have in common: ``reuse_t`` of policies.c."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("experts", "rates")),
        *((name, ctypes.c_float) for name in ("step", "floor", "doubt", "keep")),
        *((name, ctypes.c_void_p) for name in ("decay", "gain", "weights", "squares", "used")),
    )


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
        decay_F1 = 0.5 ** (1 / np.array(self.HALF_LIVES, dtype=np.float32))[:, None]
        # Written out, and dot() instead of @: for arrays as small as these that takes half the time.
        self._decay_FE, self._gain_F1 = np.repeat(decay_F1, experts, 1), 1 - decay_F1
        # Rates with the floor added, and the share of successions: what the features are the logarithms of.
        self._rate_LFE = np.full((layers, features - 1, experts), self._FLOOR, dtype=np.float32)
        self._x_LFE = np.ones((layers, features, experts), dtype=np.float32)  # the last feature is constant
        self._x_LFE[:, :-1] = np.log(self._FLOOR)
        self.weights_F = np.zeros(features, dtype=np.float32)
        self.weights_F[2] = 1.0  # begin as LRFU with a half-life of 16
        self._squares_F = np.ones(features, dtype=np.float32)
        self._against_LE = np.full((layers, experts), 1e3, dtype=np.float32)  # odds against being used next
        # [l,a,b]: how often b came behind a; the last column counts what came behind a at all.
        self._followed_LES = np.zeros((layers, experts, experts + 1), dtype=np.float32)
        self._used_S = np.ones(experts + 1, dtype=np.float32)  # of the newest call
        self._keep = np.float32(0.5 ** (1 / self.SUCCESSION_HALF_LIFE))
        self._before_L: list[np.ndarray | None] = [None] * layers
        self._compiled = None if isinstance(found := opened(), str) else found.reuse_note
        if self._compiled is not None:
            self._prepare()

    def _prepare(self) -> None:
        """For the compiled :meth:`_note`: where everything is."""
        decay_F, gain_F = np.ascontiguousarray(self._decay_FE[:, 0]), np.ascontiguousarray(self._gain_F1[:, 0])
        arrays = (decay_F, gain_F, self.weights_F, self._squares_F, self._used_S)
        numbers = (self.experts, len(decay_F), self.STEP, self._FLOOR, self._DOUBT, float(self._keep))
        self._constants = _Constants(*numbers, *(array.ctypes.data for array in arrays)), arrays
        of_layers = (self._x_LFE, self._rate_LFE, self._against_LE, self._followed_LES)
        assert all(array.flags.c_contiguous for array in of_layers)
        self._places = [
            (ctypes.addressof(self._constants[0]), *(array[row].ctypes.data for array in of_layers))
            for row in range(self.layers)
        ]

    def begin(self) -> None:
        self._before_L = [None] * self.layers

    def _note(self, row: int, experts_N: np.ndarray) -> None:
        if self._compiled is None:
            self._note_here(row, experts_N)
            return
        experts_N = np.ascontiguousarray(experts_N)
        before_N = self._before_L[row]
        before = (0, None) if before_N is None else (len(before_N), before_N.ctypes.data)
        self._compiled(*self._places[row], *before, len(experts_N), experts_N.ctypes.data)
        self._before_L[row] = experts_N

    def _note_here(self, row: int, experts_N: np.ndarray) -> None:
        """The reference of policies.c, and what runs where nothing can be compiled."""
        used_S, used_E = self._used_S, self._used_S[:-1]
        used_E[:] = 0
        used_E[experts_N] = 1
        x_FE, rate_FE, against_E = self._x_LFE[row], self._rate_LFE[row], self._against_LE[row]
        against_E += 1
        gradient_F = x_FE.dot(1 / against_E - used_E)  # of what was said at the layer's last turn
        self._squares_F += gradient_F * gradient_F
        self.weights_F -= self.STEP * gradient_F / np.sqrt(self._squares_F)
        rates_FE = rate_FE[:-1]
        rates_FE *= self._decay_FE
        rates_FE += self._gain_F1.dot((used_E + self._FLOOR)[None])
        self._succession(row, experts_N, used_S, rate_FE)
        np.log(rate_FE, out=x_FE[:-1])
        np.dot(-self.weights_F, x_FE, out=against_E)
        np.minimum(against_E, 15, out=against_E)
        np.exp(against_E, out=against_E)

    def _succession(self, row: int, experts_N: np.ndarray, used_S: np.ndarray, rate_FE: np.ndarray) -> None:
        """Share of the turns behind the experts of this one that used each expert, plus the floor, into the last of
        ``rate_FE``."""
        followed_ES, before_N = self._followed_LES[row], self._before_L[row]
        if before_N is not None:
            behind_NS = followed_ES.take(before_N, 0)  # which is faster than an index
            behind_NS *= self._keep
            behind_NS += used_S
            followed_ES[before_N] = behind_NS
        self._before_L[row] = experts_N
        behind_NS = followed_ES.take(experts_N, 0)
        weight_N = 1 / (behind_NS[:, -1] + self._DOUBT)
        weight_N /= len(experts_N)
        share_S = weight_N.dot(behind_NS)
        prior = 1 - float(share_S[-1])  # what the doubt weighs: the last column is how much was seen
        share_E = np.multiply(rate_FE[-2], prior, out=rate_FE[-1])
        share_E += share_S[:-1]
        share_E += self._FLOOR * (1 - prior)

    def scores(self) -> Scores:
        return np.asarray(-1 - self._against_LE - self.wait_L1)


def logistic(z: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(np.minimum(np.maximum(-z, -15), 15))))  # np.clip takes longer than the rest
