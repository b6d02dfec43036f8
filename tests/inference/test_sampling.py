"""The batched sampler against a naive one that knows one row and loops over the vocabulary."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inference import sampling
from inference.errors import RequestError
from inference.requests import Request, SamplingParams
from inference.sampling import TokenChooser, choose

V = 23


def kept(scores: dict[int, float], p: SamplingParams) -> dict[int, float]:
    """Probabilities of the tokens that may be drawn, in Python's own floats."""

    def softmax(chosen):
        top = max(chosen.values())
        weights = {t: math.exp(x - top) for t, x in chosen.items()}
        return {t: w / sum(weights.values()) for t, w in weights.items()}

    if p.top_k:
        least = sorted(scores.values(), reverse=True)[: p.top_k][-1]
        scores = {t: x for t, x in scores.items() if x >= least}
    if p.top_p < 1:
        chances, total, least = softmax(scores), 0.0, None
        for token in sorted(scores, key=lambda t: -scores[t]):
            least, total = scores[token], total + chances[token]
            if total >= p.top_p:
                break
        scores = {t: x for t, x in scores.items() if x >= least}
    if p.min_p:
        chances = softmax(scores)
        scores = {t: x for t, x in scores.items() if chances[t] >= p.min_p * max(chances.values())}
    return softmax(scores)


def naive(logits: list[float], p: SamplingParams, prompt: list[int], made: list[int], uniform: float) -> int:
    scores = dict(enumerate(logits))
    for token, bias in p.logit_bias:
        scores[token] += bias
    for token in {*prompt, *made}:
        x = scores[token]
        scores[token] = x / p.repetition_penalty if x > 0 else x * p.repetition_penalty
    for token in set(made):
        scores[token] -= p.presence_penalty + p.frequency_penalty * made.count(token)
    if p.temperature == 0:
        return max(scores, key=lambda t: (scores[t], -t))
    chances = kept({t: x / p.temperature for t, x in scores.items()}, p)
    passed = 0.0
    for token in sorted(chances):
        passed += chances[token]
        if passed > uniform:
            return token
    return max(chances)


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 10, 100]),
    top_p=st.sampled_from([0.05, 0.5, 0.93, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.6, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    presence_penalty=st.sampled_from([0.0, 0.9, -0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.4]),
    logit_bias=st.sampled_from([(), ((3, 4.0), (5, -100.0))]),
    seed=st.integers(-5, 5),
)
TOKENS = st.lists(st.integers(0, V - 1), max_size=6)


@settings(max_examples=200)
@given(
    st.lists(st.tuples(PARAMS, TOKENS, TOKENS), min_size=1, max_size=5),
    st.integers(0, 10**6),
    st.sampled_from([(), (1,), (2,), (1, 2)]),
)
def test_every_row_gets_the_naive_samplers_token(rows, logits_seed, candidates):
    logits = torch.randn(len(rows), V, generator=torch.Generator().manual_seed(logits_seed)) * 3
    choosers, expected = [], []
    for (params, prompt, made), row in zip(rows, logits.tolist(), strict=True):
        chooser = TokenChooser(params, prompt)
        for token in made:
            chooser.note(token)
        choosers.append(chooser)
        generator = torch.Generator().manual_seed(params.seed)
        uniform = float(torch.rand(1, generator=generator, dtype=torch.float64))
        expected.append(naive(row, params, prompt, made, uniform))
    before = logits.clone()
    few = pytest.MonkeyPatch()
    few.setattr(sampling, "NUCLEUS_CANDIDATES", candidates)
    with few.context():
        chosen = choose(logits, choosers)
    few.undo()
    assert [c.token for c in chosen] == expected
    assert torch.equal(logits, before)
    for (_, _, made), chooser, token in zip(rows, choosers, expected, strict=True):
        assert chooser.made[token] == made.count(token) + 1, "what was chosen counts from now on"


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    chooser = TokenChooser(SamplingParams(temperature=1.0, seed=3), [0])
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[choose(logits, [chooser])[0].token] += 1
    assert torch.allclose(counts / 4000, torch.softmax(logits[0], 0), atol=0.02)


def test_rows_do_not_touch_each_others_generators():
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(0))

    def run(seeds):
        choosers = [TokenChooser(SamplingParams(temperature=1.5, seed=seed), []) for seed in seeds]
        return [[c.token for c in choose(logits[[0] * len(seeds)], choosers)] for _ in range(20)]

    together = run([7, 8, 9])
    for column, seed in enumerate([7, 8, 9]):
        assert [row[column] for row in together] == [row[0] for row in run([seed])]


def test_without_a_seed_answers_differ():
    logits = torch.zeros(8, 1000)
    choosers = [TokenChooser(SamplingParams(temperature=1.0), []) for _ in range(8)]
    assert len({c.token for c in choose(logits, choosers)}) > 4


def test_equals_of_the_last_stay():
    logits = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    for keep, amount in ((sampling.keep_top_k, 1), (sampling.keep_top_p, 0.3)):
        scores = logits.clone()
        keep(scores, [amount])
        assert scores[0].isfinite().tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    "extreme", [{"temperature": 1e-300}, {"repetition_penalty": 1e-4}, {"repetition_penalty": 1e4}]
)
def test_extreme_settings_still_draw_tokens(extreme):
    logits_RV = torch.tensor([[1.0, 3.0, -2.0, 2.9]])
    params = SamplingParams(**{"temperature": 1.0, "seed": 0} | extreme)
    (chosen,) = choose(logits_RV, [TokenChooser(params, (1,))])
    winner = {"temperature": [1], "repetition_penalty": [1] if params.repetition_penalty < 1 else [0, 2, 3]}
    assert chosen.token in winner[next(iter(extreme))]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logit_bias", ((0, 1e300),)),
        ("logit_bias", ((0, 1.0), (1, -1e5))),
        ("logit_bias", ((0, math.nan),)),
        ("presence_penalty", 1e308),
        ("frequency_penalty", -1e308),
        ("repetition_penalty", 1e-5),
        ("repetition_penalty", 1e5),
    ],
)
def test_settings_that_leave_the_range_of_fp32_are_refused(field, value):
    with pytest.raises(RequestError, match=f"{field}=.* is out of range") as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field


def test_a_row_from_which_nothing_can_be_drawn_is_no_token():
    """As if it were damaged; never a token outside the vocabulary, and other rows do not notice."""
    logits_RV = torch.tensor([[1.0, 3e38, 2.0], [1.0, 3.0, 2.0]])
    params = SamplingParams(temperature=0.1, seed=0, logprobs=1)
    broken, whole = choose(logits_RV, [TokenChooser(params, ()), TokenChooser(params, ())])
    assert broken is None
    assert whole.token == choose(logits_RV[1:], [TokenChooser(params, ())])[0].token


def test_a_draw_that_is_asked_for_again_is_the_same():
    chooser, again = (TokenChooser(SamplingParams(temperature=1.0, seed=3), ()) for _ in range(2))
    logits_RV = torch.zeros(1, 1000)
    sampling._draw(logits_RV.clone(), [again])  # and then it failed
    for _ in range(3):
        assert choose(logits_RV, [again])[0].token == choose(logits_RV, [chooser])[0].token


def test_logprobs_are_of_the_raw_logits():
    logits = torch.randn(2, V, generator=torch.Generator().manual_seed(1))
    odd = SamplingParams(temperature=0.5, top_k=1, logit_bias=((4, 50.0),), seed=0, logprobs=3)
    plain = SamplingParams(logprobs=0)
    drawn, greedy = choose(logits, [TokenChooser(odd, []), TokenChooser(plain, [])])
    reference = torch.log_softmax(logits, dim=-1)
    assert drawn.token == drawn.logprobs.token_id == 4
    assert drawn.logprobs.logprob == pytest.approx(reference[0, 4].item())
    values, ids = reference[0].topk(3)
    assert [token for token, _ in drawn.logprobs.top] == ids.tolist()
    assert [value for _, value in drawn.logprobs.top] == pytest.approx(values.tolist())
    assert greedy.logprobs.top == ()
    assert greedy.logprobs.logprob == pytest.approx(reference[1].max().item())
    assert choose(logits[:1], [TokenChooser(SamplingParams(), [])])[0].logprobs is None


@pytest.mark.parametrize("damage", [float("nan"), float("inf")])
def test_damaged_logits_are_no_token_and_other_rows_go_on(damage):
    logits = torch.zeros(3, V)
    logits[1, 4] = damage
    logits[2, 7] = 1
    params = SamplingParams(), SamplingParams(temperature=1.0, seed=0, top_p=0.5), SamplingParams()
    first, second, third = choose(logits, [TokenChooser(each, []) for each in params])
    assert (first.token, second, third.token) == (0, None, 7)


@pytest.mark.parametrize(
    ("setting", "field"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": float("inf")}, "presence_penalty"),
        ({"logit_bias": ((3, float("nan")),)}, "logit_bias"),
        ({"seed": 2**63}, "seed"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"stop": ("",)}, "stop"),
        ({"stop": "END"}, "stop"),
        ({"temperature": None}, "temperature"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_p": "0.5"}, "top_p"),
        ({"seed": 1.0}, "seed"),
        ({"logprobs": "3"}, "logprobs"),
        ({"stop": None}, "stop"),
        ({"stop": (3,)}, "stop"),
        ({"stop_token_ids": 3}, "stop_token_ids"),
        ({"stop_token_ids": (3.0,)}, "stop_token_ids"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias"),
        ({"logit_bias": (5, 1.0)}, "logit_bias"),
        ({"ignore_eos": 1}, "ignore_eos"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(setting, field):
    with pytest.raises(RequestError, match=field) as caught:
        SamplingParams(**setting)
    assert caught.value.field == field


def test_a_bias_may_be_a_mapping():
    assert SamplingParams(logit_bias={5: 1.0}) == SamplingParams(logit_bias=((5, 1.0),))


def test_a_token_that_is_no_whole_number_is_refused():
    with pytest.raises(RequestError, match=r"token 1\.7 is no whole number"):
        Request("a", (1.7, 2))


def test_empty_requests_are_refused():
    with pytest.raises(RequestError, match="empty prompt"):
        Request("a", ())
    with pytest.raises(RequestError, match="at least 1"):
        Request("a", (1,), max_new_tokens=0)
