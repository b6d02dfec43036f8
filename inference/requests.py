"""What is asked of the engine and what it answers, as values. No torch here.

A request's tokens depend on the model, the request and its seed alone, never on what else is served at the time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real

from inference.errors import RequestError

MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_SHIFT = 1e4  # of biases, penalties and the factor of repetitions: any logit is far below, fp32 far above


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen from the model's logits, in exactly this order.

    1. ``logit_bias`` is added.
    2. ``repetition_penalty`` r, over all tokens of the prompt and of the answer so far: a positive logit is divided by
       r, a negative one multiplied (Keskar et al. 2019, CTRL).
    3. ``presence_penalty`` is subtracted once from every token of the answer so far, and ``frequency_penalty`` times
       the number of its occurrences there. As OpenAI and vLLM define them, the prompt does not count.
    4. ``temperature``: logits are divided by it, or by 1e-5 if it is smaller. At 0 the largest logit wins (the lowest
       id among equals), and the steps below do nothing.
    5. ``top_k``: only the k largest logits stay. Tokens that equal the k-th stay too.
    6. ``top_p``: of the softmax over what is left, the fewest tokens whose probabilities add up to at least p stay,
       most probable first (Holtzman et al. 2020). Tokens that equal the last of them stay too.
    7. ``min_p``: of the softmax over what is left, tokens less probable than ``min_p`` times the most probable one go
       (Nguyen et al. 2024).
    8. One draw from the softmax over what is left, by this request's own generator.

    Everything is computed in fp32 on the CPU, and one draw consumes one number of the generator, so that a seed means
    the same on every device that yields the same logits.

    Attributes:
        temperature: 0 or more.
        top_k: 1 or more; 0 switches it off.
        top_p: above 0, up to 1; 1 switches it off.
        min_p: 0 to 1; 0 switches it off.
        repetition_penalty: 1e-4 to 1e4; 1 switches it off.
        presence_penalty, frequency_penalty: -1e4 to 1e4; 0 switches them off.
        logit_bias: (token, what to add) pairs, or a mapping; -1e4 to 1e4.
        seed: of this request's generator, any integer of 64 bits; None: one that nobody can foresee.
        stop: the answer ends before the first of these strings, wherever tokens begin or end.
        stop_token_ids: the answer ends after any of these tokens, as it does after the model's own end of sequence.
            The token is in ``Output.new_ids``, its text is not in ``Output.text``.
        ignore_eos: the model's own end-of-sequence tokens end nothing; ``stop_token_ids`` still do.
        logprobs: None: none. n: for each new token its own log probability and those of the n most probable tokens.
            They are of the model's own distribution, log softmax of the raw logits, before step 1.

    Raises:
        RequestError: a value is out of range or of a wrong type.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        self._check_types()
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise RequestError(each.name, f"{each.name}={value} is not a finite number")
        _in_range("temperature", self.temperature, self.temperature >= 0, "0 or more")
        _in_range("top_k", self.top_k, self.top_k >= 0, "0 (off) or more")
        _in_range("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        _in_range("min_p", self.min_p, 0 <= self.min_p <= 1, "0 to 1")
        within = 1 / MAX_SHIFT <= self.repetition_penalty <= MAX_SHIFT
        _in_range("repetition_penalty", self.repetition_penalty, within, f"{1 / MAX_SHIFT:g} to {MAX_SHIFT:g}")
        shifts = [(name, getattr(self, name)) for name in ("presence_penalty", "frequency_penalty")]
        for name, shift in [*shifts, *(("logit_bias", bias) for _, bias in self.logit_bias)]:
            _in_range(name, shift, abs(shift) <= MAX_SHIFT, f"{-MAX_SHIFT:g} to {MAX_SHIFT:g}")
        _in_range("seed", self.seed, self.seed is None or -(2**63) <= self.seed < 2**63, "an integer of 64 bits")
        _in_range("logprobs", self.logprobs, 0 <= (self.logprobs or 0) <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}")
        if "" in self.stop:
            raise RequestError("stop", "stop has an empty string, before which every answer ends; leave it out")
        if len(self.stop) > MAX_STOPS:
            raise RequestError("stop", f"stop must be at most {MAX_STOPS} strings")

    def _check_types(self) -> None:
        bias: object = self.logit_bias
        if isinstance(bias, Mapping):
            object.__setattr__(self, "logit_bias", tuple(bias.items()))
        if isinstance(self.stop, str):
            raise RequestError("stop", "stop is one string; give a tuple of strings")
        shares = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        for names, good, wanted in (
            (shares, _is_number, "a number"),
            (("top_k",), _is_whole, "a whole number"),
            (("seed", "logprobs"), lambda value: value is None or _is_whole(value), "a whole number or None"),
            (("ignore_eos",), lambda value: isinstance(value, bool), "True or False"),
            (("stop",), lambda value: _all(value, lambda one: isinstance(one, str)), "a tuple of strings"),
            (("stop_token_ids",), lambda value: _all(value, _is_whole), "a tuple of token ids"),
            (("logit_bias",), lambda value: _all(value, _is_bias), "(token id, number) pairs or a mapping of them"),
        ):
            for name in names:
                if not good(value := getattr(self, name)):
                    raise RequestError(name, f"{name}={value!r} is of a wrong type; give {wanted}")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def _is_bias(pair: object) -> bool:
    return isinstance(pair, tuple | list) and len(pair) == 2 and _is_whole(pair[0]) and _is_number(pair[1])


def _all(values: object, good: Callable[[object], bool]) -> bool:
    return isinstance(values, Collection) and all(good(value) for value in values)


def _in_range(field: str, value: object, good: bool, allowed: str) -> None:
    if not good:
        raise RequestError(field, f"{field}={value} is out of range; give {allowed}")


@dataclass(frozen=True)
class Request:
    """One prompt to be continued.

    Attributes:
        id: any string that no other request in the engine has.
        prompt_ids: at least one token.
        params: how tokens are chosen and what ends the answer.
        max_new_tokens: at least 1; the answer ends there at the latest.
        adapter: name of one of the adapters that were loaded; None: the base model alone.

    Raises:
        RequestError: the prompt is empty or no token ids, or ``max_new_tokens`` below 1.
    """

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams = SamplingParams()
    max_new_tokens: int = 64
    adapter: str | None = None

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise RequestError("prompt_ids", "an empty prompt; give at least one token")
        for token in self.prompt_ids:
            if not _is_whole(token):
                raise RequestError("prompt_ids", f"token {token!r} is no whole number; give token ids")
        if type(self.max_new_tokens) is not int:
            raise RequestError("max_new_tokens", f"max_new_tokens={self.max_new_tokens!r} is no whole number")
        if self.max_new_tokens < 1:
            raise RequestError("max_new_tokens", f"max_new_tokens={self.max_new_tokens} must be at least 1")


@dataclass(frozen=True)
class TokenLogprobs:
    """Log probabilities at one new token's place.

    Attributes:
        token_id: the token that was chosen.
        logprob: its own.
        top: (token, log probability) of the most probable tokens, best first, as many as were asked for. The chosen
            token need not be among them.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Output:
    """What one engine step adds to one request's answer. The answer is the concatenation of its outputs.

    Attributes:
        id: the request's.
        new_ids: new tokens, an ending token included. Empty in an output that only ends a request.
        text: new text, always whole characters. It may lag behind the tokens: what may be a part of a character or the
            beginning of a stop string is held back until it is known. Stop strings and special tokens are not in it.
        logprobs: one for each of ``new_ids`` if they were asked for, else empty.
        finish: None: there will be more. ``eos``: the model ended the text. ``stop``: a stop string or stop token was
            met. ``length``: ``max_new_tokens`` were made. ``cancelled``: on request. ``error``: see ``error``.
        reused: tokens of the prompt that did not have to be computed since an earlier request began the same way; in
            every output of the request.
        error: a sentence, with finish ``error`` only.
    """

    id: str
    new_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: str | None = None
    reused: int = 0
    error: str | None = None
