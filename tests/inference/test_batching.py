"""Requests beside each other get what they would get alone."""

from __future__ import annotations

import random
import threading
from dataclasses import replace

import pytest
import torch

from inference.engine import LLM
from inference.errors import InferenceError, RequestError
from inference.requests import Request, SamplingParams

SAMPLED = SamplingParams(temperature=0.8, top_p=0.9, top_k=50, seed=11, repetition_penalty=1.1, frequency_penalty=0.2)


def drive(engine, arrivals=(), cancels=()):
    """All outputs by request; ``arrivals`` and ``cancels`` are (step, what) pairs."""
    outputs, now = {}, 0
    waiting, unwanted = sorted(arrivals, key=lambda pair: pair[0]), sorted(cancels)
    while waiting or engine.has_work():
        while waiting and waiting[0][0] <= now:
            engine.submit(waiting.pop(0)[1])
        while unwanted and unwanted[0][0] <= now:
            engine.cancel(unwanted.pop(0)[1])
        for output in engine.step():
            outputs.setdefault(output.id, []).append(output)
        now += 1
        assert now < 2000
    assert engine.pool.free == engine.pool.num_blocks
    assert engine.load().running == engine.load().waiting == engine.load().used == 0
    return outputs


def tokens(outputs):
    return [token for output in outputs for token in output.new_ids]


def text(outputs):
    return "".join(output.text for output in outputs)


@pytest.fixture(scope="module")
def llm(model_folder):
    return LLM(model_folder, expert_budget=0.3, device="cpu", poison=True)


@pytest.fixture(scope="module")
def requests(prompts):
    """Prompts of up to 100 tokens, of which some begin alike."""
    made = []
    for i, prompt in enumerate(prompts[:12]):
        long = (prompts[15] * 3 + prompt) if i % 3 == 0 else prompt * (1 + i % 4)
        params = SAMPLED if i % 2 else SamplingParams(logprobs=2)
        made.append(Request(str(i), tuple(long), params, max_new_tokens=4 + 9 * (i % 5)))
    return made


@pytest.fixture(scope="module")
def alone(model_folder, requests):
    one = LLM(model_folder, device="cpu", max_sequences=1, max_rows=512, reuse=False)
    return {r.id: drive(one.engine, [(0, r)])[r.id] for r in requests}


@pytest.mark.parametrize(
    ("kv_tokens", "max_rows", "max_sequences"), [(4096, 512, 64), (160, 24, 6), (4096, 5, 5)], ids=str
)
def test_tokens_do_not_depend_on_what_else_is_served(model_folder, requests, alone, kv_tokens, max_rows, max_sequences):
    llm = LLM(
        model_folder, expert_budget=0.3, device="cpu", poison=True, kv_tokens=kv_tokens, max_rows=max_rows,
        max_sequences=max_sequences,
    )  # fmt: skip
    chance = random.Random(5)
    outputs = drive(llm.engine, [(chance.randrange(12), request) for request in requests])
    for name, expected in alone.items():
        assert tokens(outputs[name]) == tokens(expected), name
        assert text(outputs[name]) == text(expected), name
        assert [o.finish for o in outputs[name]] == [None] * (len(outputs[name]) - 1) + ["length"]
    if kv_tokens == 160:
        assert llm.engine._scheduler.preemptions > 0, "the cache was meant to be too small"
    else:
        assert llm.engine.counts.reused > 0, "prompts begin alike"


def test_a_batch_has_the_same_bits_at_every_budget(model_folder, requests):
    asked = [replace(r, params=replace(r.params, logprobs=20)) for r in requests[:8]]
    runs = []
    for budget in (0.0, 0.1, 0.25, 1.0):
        llm = LLM(model_folder, expert_budget=budget, device="cpu", poison=True, max_rows=40, max_sequences=8)
        runs.append(drive(llm.engine, enumerate(asked)))
    assert all(run == runs[0] for run in runs[1:]), "tokens, and 20 log probabilities of each"


def test_prompts_that_begin_alike_are_computed_once(llm, prompts):
    long = tuple(prompts[15] * 4)
    first = drive(llm.engine, [(0, Request("first", long, max_new_tokens=6))])["first"]
    before = llm.engine.counts.rows
    again = drive(llm.engine, [(0, Request("again", long, max_new_tokens=6))])["again"]
    assert tokens(again) == tokens(first)
    assert {o.reused for o in first} == {0}
    assert {o.reused for o in again} == {64}, "72 tokens are four full blocks of 16 and a rest"
    assert llm.engine.counts.rows - before == len(long) - 64 + 5


def test_cancelled_requests_leave_and_the_others_do_not_notice(llm, requests, alone):
    cancels = [(2, "1"), (3, "6"), (0, "4"), (5, "nobody")]
    outputs = drive(llm.engine, [(0, request) for request in requests], cancels)
    for name, expected in alone.items():
        if name in {"1", "4", "6"}:
            assert outputs[name][-1].finish == "cancelled"
            assert tokens(outputs[name]) == tokens(expected)[: len(tokens(outputs[name]))]
            assert len(tokens(outputs[name])) < len(tokens(expected))
        else:
            assert tokens(outputs[name]) == tokens(expected)


def test_submit_and_cancel_from_other_threads(llm, prompts):
    ends, done = {}, threading.Event()

    def client(number):
        for i in range(4):
            llm.engine.submit(Request(f"{number}-{i}", tuple(prompts[number]), max_new_tokens=5))
            if i % 2:
                llm.engine.cancel(f"{number}-{i}")

    def serve():
        while not done.is_set() or llm.engine.has_work():
            for output in llm.engine.step():
                if output.finish is not None:
                    assert output.id not in ends
                    ends[output.id] = output.finish

    server = threading.Thread(target=serve)
    clients = [threading.Thread(target=client, args=(number,)) for number in range(6)]
    for thread in (server, *clients):
        thread.start()
    for thread in clients:
        thread.join(timeout=30)
    done.set()
    server.join(timeout=60)
    assert not server.is_alive()
    assert len(ends) == 24
    assert all(ends[f"{number}-0"] == "length" for number in range(6))


def test_a_stop_string_ends_the_answer_before_it(llm, prompts):
    (free,) = llm.generate([prompts[3]], 40)
    stop = free.text[7:10]
    cut = free.text.index(stop)
    (stopped,) = llm.generate([prompts[3]], 40, stop=(stop, "never made"))
    assert stopped.text == free.text[:cut]
    assert stopped.finish == "stop"
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]
    assert len(stopped.token_ids) < 40


def test_stop_tokens_end_and_do_not_show(llm, prompts):
    (free,) = llm.generate([prompts[3]], 40)
    token = free.token_ids[12]
    at = free.token_ids.index(token)
    (stopped,) = llm.generate([prompts[3]], 40, stop_token_ids=(token,))
    assert stopped.token_ids == free.token_ids[: at + 1]
    assert stopped.finish == "stop"
    assert stopped.text == llm.tokenizer.decode(free.token_ids[:at], skip_special_tokens=True)


def test_logprobs_are_the_models(llm, prompts):
    params = SamplingParams(logprobs=3)
    outputs = drive(llm.engine, [(0, Request("a", tuple(prompts[5]), params, 6))])["a"]
    made = tokens(outputs)
    reference = torch.log_softmax(llm.logits([*prompts[5], *made])[len(prompts[5]) - 1 : -1], dim=-1)
    for row, token, output in zip(reference, made, outputs, strict=True):
        (found,) = output.logprobs
        assert found.token_id == token
        assert found.logprob == pytest.approx(row[token].item(), abs=1e-4)
        assert [t for t, _ in found.top] == row.topk(3).indices.tolist()


def test_a_failing_pass_ends_its_own_requests_only(model_folder, prompts, caplog):
    llm = LLM(model_folder, device="cpu")
    expected = llm.generate([prompts[1]], 4)

    def fail(_pass):
        raise MemoryError("no room for a tensor")

    llm.engine.watch = fail
    llm.engine.submit(Request("a", tuple(prompts[0])))
    (output,) = llm.engine.step()
    assert (output.finish, output.error) == ("error", "MemoryError: no room for a tensor")
    assert "1 requests end: no room for a tensor" in caplog.text
    with pytest.raises(RuntimeError, match="no room for a tensor") as caught:
        llm.generate([prompts[0], prompts[1]], 4)
    assert isinstance(caught.value.__cause__, MemoryError)
    llm.engine.watch = None
    assert llm.generate([prompts[1]], 4) == expected
    assert llm.engine.pool.free == llm.engine.pool.num_blocks


def test_one_that_cannot_be_computed_does_not_end_those_of_its_step(model_folder, prompts, caplog):
    settings = {"temperature": 1.0}
    expected = LLM(model_folder, device="cpu").generate([prompts[0], prompts[1]], 6, **settings)
    llm = LLM(model_folder, device="cpu")

    def fail(made):
        if any(chunk.sequence.id == "bad" and chunk.start > 0 for chunk in made.chunks):
            raise IndexError("index out of range in self")

    llm.engine.watch = fail
    names = ["0", "bad", "1"]
    ways = {name: SamplingParams(temperature=1.0, seed=int(name == "1")) for name in names}
    asked = {"0": prompts[0], "1": prompts[1], "bad": prompts[2]}
    outputs = drive(llm.engine, [(0, Request(name, tuple(asked[name]), ways[name], 6)) for name in names])
    assert outputs["bad"][-1].error == "IndexError: index out of range in self"
    assert [tuple(tokens(outputs[name])) for name in ("0", "1")] == [one.token_ids for one in expected]
    assert "a pass of 3 requests failed" in caplog.text


def test_a_token_that_the_tokenizer_does_not_know_ends_its_own_request_only(model_folder, prompts, caplog):
    llm = LLM(model_folder, device="cpu")
    bad, good = llm.generate([prompts[0], prompts[1]], 8)
    unknown = next(token for token in bad.token_ids if token not in good.token_ids)

    def decode(ids):
        if unknown in ids:
            raise KeyError(unknown)
        return ""

    llm.engine._decode = decode
    arrivals = [(0, Request(str(i), tuple(prompts[i]), max_new_tokens=8)) for i in (0, 1)]
    outputs = drive(llm.engine, arrivals)
    assert (outputs["0"][-1].finish, outputs["0"][-1].error) == ("error", f"KeyError: {unknown}")
    assert tuple(tokens(outputs["1"])) == good.token_ids
    assert "1 requests end" in caplog.text


def test_what_is_not_finite_reaches_nobody_else(model_folder, prompts, caplog):
    llm = LLM(model_folder, device="cpu", kv_tokens=96)
    engine, spoilt, sound = llm.engine, tuple(prompts[15] * 2), tuple(prompts[14])
    expected = llm.generate([sound, sound], 12)
    engine.submit(Request("spoilt", spoilt, max_new_tokens=40))
    engine.submit(Request("sound", sound, max_new_tokens=12))
    outputs = engine.step()
    engine._kv.pool_LNSCD[:, engine._answers["spoilt"].sequence.table.blocks[1]] = float("nan")
    while engine.has_work():
        outputs += engine.step()
    ends = {output.id: (output.finish, output.error) for output in outputs if output.finish}
    assert ends["sound"] == ("length", None)
    assert ends["spoilt"][0] == "error"
    assert "logits are not finite" in ends["spoilt"][1]
    assert engine._kv.pool_LNSCD.isfinite().all()
    assert tuple(tokens([o for o in outputs if o.id == "sound"])) == expected[0].token_ids
    assert llm.generate([spoilt], 40) == LLM(model_folder, device="cpu").generate([spoilt], 40)
    assert llm.generate([sound, sound], 12) == expected


def test_the_watch_sees_every_token_once(llm, prompts):
    seen = []
    llm.engine.watch = lambda made: seen.extend(
        (chunk.sequence.id, at) for chunk in made.chunks for at in range(chunk.start, chunk.start + chunk.rows)
    )
    drive(llm.engine, [(0, Request("a", tuple(prompts[2]), max_new_tokens=3))])
    llm.engine.watch = None
    assert seen == [("a", at) for at in range(len(prompts[2]) + 2)]


def test_what_can_never_be_served_is_refused_with_figures(model_folder):
    llm = LLM(model_folder, device="cpu", kv_tokens=70)
    assert llm.engine.pool.tokens == 80, "whole blocks"
    per_token = 4 * 2 * 2 * 16 * 4
    with pytest.raises(
        RequestError,
        match=rf"70 prompt tokens and 16 new ones can never fit.*holds 80 tokens in {80 * per_token / 1e6:.1f} MB.*"
        "kv_tokens=86",
    ):
        llm.generate([[1] * 70], 16)
    assert len(llm.generate([[1] * 64], 16)[0].token_ids) == 16
    with pytest.raises(InferenceError, match=r"kv_tokens=0 leaves no room.*one block of 16 tokens takes 0\.02 MB"):
        LLM(model_folder, device="cpu", kv_tokens=0)
    with pytest.raises(InferenceError, match="max_rows=4 must be at least max_sequences=8"):
        LLM(model_folder, device="cpu", max_rows=4, max_sequences=8)


@pytest.mark.parametrize(
    ("request_", "field", "message"),
    [
        (Request("a", (1, 512)), "prompt_ids", "token 512 is outside"),
        (Request("a", (1,), SamplingParams(stop_token_ids=(-1,))), "stop_token_ids", "token -1 is outside"),
        (Request("a", (1,), SamplingParams(logit_bias=((600, 1.0),))), "logit_bias", "token 600 is outside"),
        (Request("a", (1,), adapter="law"), "adapter", "there is no adapter 'law'; loaded: none"),
        (Request("a", (1,), max_new_tokens=256), "max_new_tokens", "exceed the model's 256 positions"),
    ],
)
def test_requests_that_cannot_be_served_are_refused_by_field(llm, request_, field, message):
    with pytest.raises(RequestError, match=message) as caught:
        llm.engine.submit(request_)
    assert caught.value.field == field
    assert not llm.engine.has_work()


def test_ids_are_of_one_request_at_a_time(llm):
    llm.engine.submit(Request("a", (1,), max_new_tokens=2))
    with pytest.raises(RequestError, match="'a' is being served already"):
        llm.engine.submit(Request("a", (1,)))
    assert len(tokens(drive(llm.engine)["a"])) == 2
    assert len(tokens(drive(llm.engine, [(0, Request("a", (1,), max_new_tokens=2))])["a"])) == 2


def test_unknown_settings_are_refused(llm):
    with pytest.raises(InferenceError, match="no sampling setting is called topp; there are temperature, top_k"):
        llm.generate([[1]], 4, topp=0.5)
