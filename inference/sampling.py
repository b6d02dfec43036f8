"""From logits to the next tokens, for all rows of a step at once.

What is computed, and in which order, is told in :class:`inference.requests.SamplingParams`. Every filter is a threshold
on the row's logits, so equal logits stay or go together and no result depends on how a sort orders them.

Shapes: R rows, V vocabulary, C candidates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inference.errors import InferenceError
from inference.requests import SamplingParams, TokenLogprobs

# A nucleus is looked for among so many of the largest logits first; sorting a whole vocabulary takes far longer.
NUCLEUS_CANDIDATES = 1024
_OFF = float("-inf")


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

    def note(self, token: int) -> None:
        """``token`` was chosen."""
        self.made[token] += 1
        self.seen.add(token)


@dataclass(frozen=True)
class Chosen:
    """A token, with its log probabilities if they were asked for."""

    token: int
    logprobs: TokenLogprobs | None


def choose(logits_RV: Tensor, choosers: Sequence[TokenChooser]) -> list[Chosen]:
    """The next token of every row, noted in its chooser.

    Args:
        logits_RV: raw scores, on any device and in any float type. They are not changed.
        choosers: one for each row.

    Raises InferenceError if a row's logits hold NaN or infinity where its largest should be.
    """
    best_R, token_R = logits_RV.max(dim=-1)  # of equal ones the first
    if not bool(best_R.isfinite().all()):
        raise InferenceError("the model's logits are not finite; its weights or its precision are damaged")
    tokens = token_R.tolist()
    drawn = [row for row, chooser in enumerate(choosers) if not chooser.plain]
    if drawn:
        chosen = _draw(logits_RV[drawn].to("cpu", torch.float32, copy=True), [choosers[row] for row in drawn])
        for row, token in zip(drawn, chosen, strict=True):
            tokens[row] = token
    logprobs = _logprobs(logits_RV, tokens, choosers)
    for token, chooser in zip(tokens, choosers, strict=True):
        chooser.note(token)
    return [Chosen(token, logprobs.get(row)) for row, token in enumerate(tokens)]


def _draw(logits_RV: Tensor, choosers: Sequence[TokenChooser]) -> list[int]:
    """Tokens of rows that need more than the largest raw logit. Changes ``logits_RV``."""
    for logits_V, chooser in zip(logits_RV, choosers, strict=True):
        if chooser.adjusts:
            chooser.adjust(logits_V)
    tokens: list[int] = logits_RV.argmax(dim=-1).tolist()
    warm = [row for row, chooser in enumerate(choosers) if chooser.params.temperature > 0]
    if not warm:
        return tokens
    params = [choosers[row].params for row in warm]
    scaled_RV = logits_RV[warm] / torch.tensor([p.temperature for p in params])[:, None]
    keep_top_k(scaled_RV, [p.top_k for p in params])
    keep_top_p(scaled_RV, [p.top_p for p in params])
    keep_min_p(scaled_RV, [p.min_p for p in params])
    uniform_R = torch.cat([torch.rand(1, generator=choosers[row].generator, dtype=torch.float64) for row in warm])
    cumulated_RV = torch.softmax(scaled_RV, dim=-1).cumsum(dim=-1, dtype=torch.float64)
    total_R = cumulated_RV[:, -1]
    target_R = torch.minimum(uniform_R * total_R, torch.nextafter(total_R, torch.zeros(())))
    drawn_R = torch.searchsorted(cumulated_RV, target_R[:, None], right=True)[:, 0]
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
    candidates = min(NUCLEUS_CANDIDATES, logits_RV.shape[1])
    while rows:
        within_RV = logits_RV[rows]
        largest_RC = within_RV.topk(candidates, dim=-1, sorted=True).values
        cumulated_RC = (largest_RC - within_RV.logsumexp(dim=-1, keepdim=True)).exp().cumsum(-1, dtype=torch.float64)
        wanted_R = torch.tensor([top_p[row] for row in rows], dtype=torch.float64)
        place_R = torch.searchsorted(cumulated_RC, wanted_R[:, None]).clamp_(max=candidates - 1)
        found_R = (cumulated_RC[:, -1] >= wanted_R) | (candidates == logits_RV.shape[1])
        ready = [i for i, found in enumerate(found_R.tolist()) if found]
        _keep_from(logits_RV, [rows[i] for i in ready], largest_RC.gather(1, place_R)[ready])
        rows = [row for i, row in enumerate(rows) if i not in ready]
        candidates = logits_RV.shape[1]


def keep_min_p(logits_RV: Tensor, min_p: Sequence[float]) -> None:
    """Puts minus infinity for tokens less probable than ``min_p`` times the row's most probable one; 0 keeps all."""
    rows = [row for row, p in enumerate(min_p) if p > 0]
    if rows:
        ratio_R1 = torch.tensor([min_p[row] for row in rows])[:, None]
        _keep_from(logits_RV, rows, logits_RV[rows].amax(dim=-1, keepdim=True) + ratio_R1.log())


def _keep_from(logits_RV: Tensor, rows: Sequence[int], least_R1: Tensor) -> None:
    if rows:
        within_RV = logits_RV[rows]
        logits_RV[rows] = within_RV.masked_fill(within_RV < least_R1, _OFF)


def _logprobs(logits_RV: Tensor, tokens: Sequence[int], choosers: Sequence[TokenChooser]) -> dict[int, TokenLogprobs]:
    """By row, for the rows that ask."""
    asked = {row: c.params.logprobs for row, c in enumerate(choosers) if c.params.logprobs is not None}
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


def next_token(logits_V: Tensor, temperature: float, generator: torch.Generator | None) -> int:
    """One row, until the engine chooses for all."""
    if temperature == 0:
        return int(logits_V.argmax())
    probabilities_V = torch.softmax(logits_V.float().cpu() / temperature, dim=-1)
    return int(torch.multinomial(probabilities_V, 1, generator=generator))
