"""From logits to the next tokens, for all rows of a step at once.

What is computed, and in which order, is told in :class:`inference.requests.SamplingParams`. Every filter is a threshold
on the row's logits, so equal logits stay or go together and no result depends on how a sort orders them.

Shapes: R rows, V vocabulary, C candidates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from inference.requests import SamplingParams, TokenLogprobs

# A nucleus is looked for among so many of the largest logits first; sorting a large vocabulary takes far longer.
NUCLEUS_CANDIDATES = (64, 1024)
_OFF = float("-inf")
_COLDEST = 1e-5  # below, every other token has lost already, and quotients would leave fp32's range


class TokenChooser:
    """Chooses one request's tokens: its settings, its generator and what its penalties count.

    Args:
        params: the settings.
        prompt_ids: what the repetition penalty counts beside the answer.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        self.params = params
        self.seen = set(prompt_ids) if params.repetition_penalty != 1 else set()
        self.made: Counter[int] = Counter()
        self._drawn_1: Tensor | None = None
        self.generator = torch.Generator()
        if params.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(params.seed)

    @property
    def plain(self) -> bool:
        """The largest of the raw logits is the answer."""
        return self.params.temperature == 0 and not self.adjusts

    @property
    def adjusts(self) -> bool:
        p = self.params
        penalised = p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0
        return penalised or bool(p.logit_bias)

    def adjust(self, logits_V: Tensor) -> None:
        """Steps 1 to 3, in place."""
        p = self.params
        for token, bias in p.logit_bias:
            logits_V[token] += bias
        if p.repetition_penalty != 1 and self.seen:
            seen_N = torch.tensor(sorted(self.seen))
            found_N = logits_V[seen_N]
            logits_V[seen_N] = torch.where(found_N > 0, found_N / p.repetition_penalty, found_N * p.repetition_penalty)
        if (p.presence_penalty or p.frequency_penalty) and self.made:
            made_N = torch.tensor(list(self.made.keys()))
            times_N = torch.tensor(list(self.made.values()), dtype=torch.float32)
            logits_V[made_N] -= p.presence_penalty + p.frequency_penalty * times_N

    def draw(self) -> Tensor:
        """The number [1] that decides the next token; the same one until :meth:`note`."""
        if self._drawn_1 is None:
            self._drawn_1 = torch.rand(1, generator=self.generator, dtype=torch.float64)
        return self._drawn_1

    def note(self, token: int) -> None:
        """``token`` was chosen."""
        self._drawn_1 = None
        self.made[token] += 1
        self.seen.add(token)


@dataclass(frozen=True)
class Chosen:
    """A token, with its log probabilities if they were asked for."""

    token: int
    logprobs: TokenLogprobs | None


def choose(logits_RV: Tensor, choosers: Sequence[TokenChooser]) -> list[Chosen | None]:
    """The next token of every row, noted in its chooser; None for a row whose logits, as given or adjusted, are
    not finite.

    Nothing is noted if this raises: asked again, it answers as if for the first time.

    Args:
        logits_RV: raw scores, on any device and in any float type. They are not changed.
        choosers: one for each row.
    """
    best_R, token_R = logits_RV.max(dim=-1)  # of equal ones the first
    tokens = token_R.masked_fill(~best_R.isfinite(), -1).tolist()  # one read of a GPU's memory
    finite = [token >= 0 for token in tokens]
    drawn = [row for row, chooser in enumerate(choosers) if finite[row] and not chooser.plain]
    if drawn:
        copy_RV = logits_RV[drawn].to("cpu", torch.float32)  # taking rows by number copies them
        chosen = _draw(copy_RV, [choosers[row] for row in drawn])
        for row, token in zip(drawn, chosen, strict=True):
            tokens[row] = token
    logprobs = _logprobs(logits_RV, tokens, choosers)
    for token, chooser in zip(tokens, choosers, strict=True):
        if token >= 0:
            chooser.note(token)
    return [Chosen(token, logprobs.get(row)) if token >= 0 else None for row, token in enumerate(tokens)]


def _draw(logits_RV: Tensor, choosers: Sequence[TokenChooser]) -> list[int]:
    """Tokens of rows that need more than the largest raw logit, -1 where none can be drawn. Changes ``logits_RV``."""
    for logits_V, chooser in zip(logits_RV, choosers, strict=True):
        if chooser.adjusts:
            chooser.adjust(logits_V)
    tokens = [0] * len(choosers)
    cold = [row for row, chooser in enumerate(choosers) if chooser.params.temperature == 0]
    warm = [row for row, chooser in enumerate(choosers) if chooser.params.temperature > 0]
    for row in cold:
        tokens[row] = int(logits_RV[row].argmax())
    if not warm:
        return tokens
    params = [choosers[row].params for row in warm]
    scaled_RV = logits_RV if not cold else logits_RV[warm]
    scaled_RV /= torch.tensor([max(p.temperature, _COLDEST) for p in params])[:, None]
    keep_top_k(scaled_RV, [p.top_k for p in params])
    keep_top_p(scaled_RV, [p.top_p for p in params])
    keep_min_p(scaled_RV, [p.min_p for p in params])
    uniform_R = torch.cat([choosers[row].draw() for row in warm])
    # torch adds up in fp64 here and rounds each sum.
    cumulated_RV = torch.softmax(scaled_RV, dim=-1).cumsum(dim=-1)
    total_R = cumulated_RV[:, -1]
    target_R = torch.minimum((uniform_R * total_R).float(), torch.nextafter(total_R, torch.zeros(())))
    drawn_R = torch.searchsorted(cumulated_RV, target_R[:, None], right=True)[:, 0]
    drawn_R.masked_fill_(~(total_R > 0), -1)  # softmax of what is not finite adds up to nothing
    for row, token in zip(warm, drawn_R.tolist(), strict=True):
        tokens[row] = token
    return tokens


def keep_top_k(logits_RV: Tensor, top_k: Sequence[int]) -> None:
    """Puts minus infinity for all but each row's ``top_k`` largest and their equals; 0 keeps all."""
    rows = [row for row, k in enumerate(top_k) if 0 < k < logits_RV.shape[1]]
    if not rows:
        return
    place_R = torch.tensor([top_k[row] - 1 for row in rows])
    largest_RC = logits_RV[rows].topk(int(place_R.max()) + 1, dim=-1).values
    _keep_from(logits_RV, rows, largest_RC.gather(1, place_R[:, None]))


def keep_top_p(logits_RV: Tensor, top_p: Sequence[float]) -> None:
    """Puts minus infinity for all outside of each row's nucleus; 1 keeps all."""
    rows = [row for row, p in enumerate(top_p) if p < 1]
    vocabulary = logits_RV.shape[1]
    for candidates in (*(n for n in NUCLEUS_CANDIDATES if 8 * n < vocabulary), vocabulary):
        if not rows:
            return
        within_RV = logits_RV[rows]
        largest_RC = _largest(within_RV, candidates)
        cumulated_RC = (largest_RC - within_RV.logsumexp(dim=-1, keepdim=True)).exp_().cumsum(-1)
        wanted_R1 = torch.tensor([top_p[row] for row in rows])[:, None]
        place_R1 = torch.searchsorted(cumulated_RC, wanted_R1).clamp_(max=candidates - 1)
        found = (cumulated_RC[:, -1:] >= wanted_R1)[:, 0].tolist() if candidates < vocabulary else [True] * len(rows)
        ready = [i for i, whole in enumerate(found) if whole]
        _keep_from(logits_RV, [rows[i] for i in ready], largest_RC.gather(1, place_R1)[ready])
        rows = [row for row, whole in zip(rows, found, strict=True) if not whole]


def _largest(logits_RV: Tensor, count: int) -> Tensor:
    """The ``count`` largest of each row, largest first."""
    if count < logits_RV.shape[1]:
        return logits_RV.topk(count, dim=-1).values
    # torch sorts places along with values, and takes five times as long.
    return torch.from_numpy(-np.sort(-logits_RV.numpy(), axis=-1))


def keep_min_p(logits_RV: Tensor, min_p: Sequence[float]) -> None:
    """Puts minus infinity for tokens less probable than ``min_p`` times the row's most probable one; 0 keeps all."""
    rows = [row for row, p in enumerate(min_p) if p > 0]
    if rows:
        ratio_R1 = torch.tensor([min_p[row] for row in rows])[:, None]
        _keep_from(logits_RV, rows, logits_RV[rows].amax(dim=-1, keepdim=True) + ratio_R1.log())


def _keep_from(logits_RV: Tensor, rows: Sequence[int], least_R1: Tensor) -> None:
    if rows:
        if len(rows) == len(logits_RV):
            logits_RV.masked_fill_(logits_RV < least_R1, _OFF)
        else:
            within_RV = logits_RV[rows]
            logits_RV[rows] = within_RV.masked_fill_(within_RV < least_R1, _OFF)


def _logprobs(logits_RV: Tensor, tokens: Sequence[int], choosers: Sequence[TokenChooser]) -> dict[int, TokenLogprobs]:
    """By row, for the rows that ask."""
    several = enumerate(zip(tokens, choosers, strict=True))
    asked = {row: c.params.logprobs for row, (token, c) in several if token >= 0 and c.params.logprobs is not None}
    if not asked:
        return {}
    rows = list(asked)
    log_RV = torch.log_softmax(logits_RV[rows].float(), dim=-1)
    own = log_RV.gather(1, torch.tensor([[tokens[row]] for row in rows], device=log_RV.device))[:, 0].tolist()
    best_RC, best_id_RC = log_RV.topk(min(max(asked.values()), log_RV.shape[1]), dim=-1)
    pairs = zip(best_id_RC.tolist(), best_RC.tolist(), strict=True)
    return {
        row: TokenLogprobs(tokens[row], mine, tuple(zip(ids, values, strict=True))[: asked[row]])
        for row, mine, (ids, values) in zip(rows, own, pairs, strict=True)
    }
