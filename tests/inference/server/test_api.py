"""The real server with a tiny model, asked by the real openai client."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
openai = pytest.importorskip("openai", reason="the extra 'dev' is not installed")

PROMPT = "The gate scores"
HELLO = [{"role": "user", "content": "hello there"}]


@pytest.fixture(scope="module")
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def llm(chat_folder):
    from inference.engine import LLM

    return LLM(chat_folder, device="cpu")


def test_models_are_the_base_and_its_adapters(client):
    assert [model.id for model in client.models.list()] == ["tiny", "tiny:tuned"]
    assert client.models.retrieve("tiny:tuned").owned_by == "planaria"
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("gpt-9")
    assert missing.value.code == "model_not_found"


def test_a_greedy_completion_is_the_engines_own_text(client, llm):
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, temperature=0)
    (expected,) = llm.generate([PROMPT], 20)
    assert answer.choices[0].text == expected.text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == len(expected.prompt_ids)
    assert answer.usage.completion_tokens == 20
    assert answer.usage.total_tokens == len(expected.prompt_ids) + 20
    assert answer.object == "text_completion"
    assert answer._request_id.startswith("req_")


def test_without_max_tokens_a_completion_has_16(client):
    answer = client.completions.create(model="tiny", prompt=PROMPT, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 16


def test_several_prompts_and_choices_are_numbered_in_order(client):
    prompts = [[5, 6, 7], [8, 9]]
    both = client.completions.create(model="tiny", prompt=prompts, n=2, max_tokens=6, temperature=0)
    alone = [client.completions.create(model="tiny", prompt=p, max_tokens=6, temperature=0) for p in prompts]
    texts = [one.choices[0].text for one in alone]
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in both.choices] == [texts[0], texts[0], texts[1], texts[1]]
    assert both.usage.prompt_tokens == 5
    assert both.usage.completion_tokens == 24


def test_a_chat_completion_continues_the_rendered_template(client, llm, tokenizer):
    answer = client.chat.completions.create(
        model="tiny",
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]},
        ],
        max_completion_tokens=12,
        temperature=0,
    )
    ids = tokenizer("system: be brief<eos>user: hello<eos>assistant: ")["input_ids"]
    (expected,) = llm.generate([ids], 12)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.object == "chat.completion"


def test_a_special_token_that_a_user_spells_is_text(client, tokenizer):
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "a<eos>b"}], max_completion_tokens=1
    )
    spelt = len(tokenizer("user: a")["input_ids"]) + len(tokenizer("<eos>", split_special_tokens=True)["input_ids"])
    spelt += len(tokenizer("b")["input_ids"]) + 1 + len(tokenizer("assistant: ")["input_ids"])
    assert answer.usage.prompt_tokens == spelt


def test_a_chat_stream_has_the_pieces_of_the_whole_answer(client, server):
    asked = {"model": "tiny", "messages": HELLO, "max_completion_tokens": 12, "temperature": 0, "n": 2}
    whole = client.chat.completions.create(**asked)
    pieces = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert {piece.object for piece in pieces} == {"chat.completion.chunk"}
    assert len({(piece.id, piece.created, piece.model) for piece in pieces}) == 1
    for index in range(2):
        mine = [p.choices[0] for p in pieces if p.choices and p.choices[0].index == index]
        assert mine[0].delta.role == "assistant"
        assert all(choice.delta.role is None for choice in mine[1:])
        assert "".join(choice.delta.content or "" for choice in mine) == whole.choices[index].message.content
        assert [choice.finish_reason for choice in mine] == [None] * (len(mine) - 1) + ["length"]
    assert pieces[-1].choices == []
    assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens == 24
    assert all(piece.usage is None for piece in pieces[:-1])
    body = json.dumps(asked | {"stream": True}).encode()
    _, headers, text = server.raw("POST", "/v1/chat/completions", body, **{"content-type": "application/json"})
    assert headers["content-type"].startswith("text/event-stream")
    events = text.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all("usage" not in json.loads(event.removeprefix("data: ")) for event in events[:-2])


def test_a_completions_stream_has_the_text_and_logprobs_of_the_whole_answer(client):
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "logprobs": 2}
    whole = client.completions.create(**asked).choices[0]
    pieces = [piece.choices[0] for piece in client.completions.create(**asked, stream=True)]
    assert "".join(piece.text for piece in pieces) == whole.text
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        parts = [part for piece in pieces if piece.logprobs for part in getattr(piece.logprobs, name)]
        assert parts == pytest.approx(getattr(whole.logprobs, name)) if name == "token_logprobs" else parts
    assert pieces[-1].finish_reason == "length"


def test_logprobs_are_those_of_the_model_in_both_shapes(client, llm, tokenizer):
    ids = tokenizer(PROMPT)["input_ids"]
    (answer,) = llm.generate([ids], 5)
    rows = llm.logits([*ids, *answer.token_ids])[len(ids) - 1 : -1].float().log_softmax(-1)
    expected = [float(row[token]) for row, token in zip(rows, answer.token_ids, strict=True)]
    plain = client.completions.create(model="tiny", prompt=ids, max_tokens=5, temperature=0, logprobs=3)
    found = plain.choices[0].logprobs
    assert found.token_logprobs == pytest.approx(expected, abs=1e-4)
    assert all(len(top) in (3, 4) for top in found.top_logprobs)
    assert all(token in top for token, top in zip(found.tokens, found.top_logprobs, strict=True))
    assert found.text_offset[0] == 0
    text = "".join(token for token in found.tokens if not token.startswith(("bytes:", "token_id:")))
    assert found.text_offset[-1] <= len(text)
    chat = client.chat.completions.create(
        model="tiny", messages=HELLO, max_completion_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    content = chat.choices[0].logprobs.content
    assert len(content) == 5
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob)  # greedy
        assert sum(math.exp(top.logprob) for top in entry.top_logprobs) < 1
        if not entry.token.startswith(("bytes:", "token_id:")):
            assert bytes(entry.bytes).decode() == entry.token
    spelt = b"".join(bytes(entry.bytes) for entry in content)
    assert chat.choices[0].message.content == spelt.decode(errors="replace")


def test_a_seed_repeats_and_choices_differ(client):
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 16, "seed": 7, "n": 3}
    first, second = (client.completions.create(**asked) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in second.choices]
    assert len(set(texts)) == 3
    assert first.system_fingerprint == second.system_fingerprint
    other = client.completions.create(model="tiny:tuned", prompt=PROMPT, max_tokens=1)
    assert other.system_fingerprint != first.system_fingerprint


@pytest.mark.parametrize("as_list", [False, True])
def test_stop_ends_before_the_string(client, as_list):
    asked = {"model": "tiny", "prompt": "Memory is", "max_tokens": 40, "temperature": 0}
    text = client.completions.create(**asked).choices[0].text
    stop = next(text[i : i + 2] for i in range(6, len(text) - 2) if text[i : i + 2].isascii())
    answer = client.completions.create(**asked, stop=["never!", stop] if as_list else stop).choices[0]
    assert answer.text == text[: text.index(stop)]
    assert answer.finish_reason == "stop"


def test_a_bias_of_100_decides(client, tokenizer):
    token = tokenizer("x")["input_ids"][0]
    answer = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=3, temperature=0, logit_bias={str(token): 100}
    )
    assert answer.choices[0].text == "xxx"


def test_a_model_with_an_adapter_answers_as_the_adapter_does(client, chat_folder, adapter_folder):
    from inference.engine import LLM

    (expected,) = LLM(chat_folder, adapter=adapter_folder, device="cpu").generate([PROMPT], 12)
    asked = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    tuned = client.completions.create(model="tiny:tuned", **asked)
    assert tuned.model == "tiny:tuned"
    assert tuned.choices[0].text == expected.text
    assert client.completions.create(model="tiny", **asked).choices[0].text != expected.text


def test_a_context_that_is_too_long_has_its_code(client):
    with pytest.raises(openai.BadRequestError, match="maximum context length is 256 tokens") as long:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "abc " * 300}])
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", prompt=[3] * 100, max_tokens=157)
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", prompt="word " * 15_000)
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.BadRequestError, match="at most 200 new tokens"):
        client.completions.create(model="tiny", prompt=[3], max_tokens=201)


def test_keys_are_asked_for_and_only_of_the_api(server):
    with pytest.raises(openai.AuthenticationError) as refused:
        server.client("sk-wrong").models.list()
    assert refused.value.code == "invalid_api_key"
    assert "sk-wrong" not in str(refused.value)
    status, headers, body = server.raw("POST", "/v1/completions", b"{}", authorization="")
    assert (status, headers["www-authenticate"]) == (401, "Bearer")
    assert "Authorization: Bearer" in json.loads(body)["error"]["message"]
    for path in ("/health", "/metrics"):
        assert server.raw("GET", path, authorization="")[0] == 200


def test_a_client_that_vanishes_frees_its_place(server, client):
    before = server.metrics()
    stream = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=200, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    after = server.until(lambda m: m["planaria_cancelled_total"] == before["planaria_cancelled_total"] + 1)
    assert after["planaria_answers_running"] == 0
    assert after["planaria_new_tokens_total"] < before["planaria_new_tokens_total"] + 200


def test_many_clients_at_once_get_what_one_gets(client):
    asked = [{"model": "tiny", "prompt": [5 + i, 6, 7], "max_tokens": 8, "seed": i} for i in range(16)]
    alone = [client.completions.create(**each).choices[0].text for each in asked]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda each: client.completions.create(**each).choices[0].text, asked, timeout=60))
    assert together == alone


def test_metrics_and_the_log_tell_of_requests_without_their_texts(server, client):
    before = server.metrics()
    answer = client.completions.create(
        model="tiny", prompt="secret words", max_tokens=5, extra_body={"ignore_eos": True}
    )
    after = server.metrics()

    def grown(name):
        return after[name] - before[name]

    assert grown("planaria_new_tokens_total") == 5
    assert grown("planaria_prompt_tokens_total") == answer.usage.prompt_tokens
    assert grown("planaria_time_to_first_token_seconds_count") == 1
    assert grown("planaria_inter_token_seconds_count") == 4
    experts = grown("planaria_expert_hits_total") + grown("planaria_expert_misses_total")
    assert experts >= 4 * 4 * 4  # layers, experts of a token, tokens after the first
    assert grown("planaria_expert_bytes_total") == grown("planaria_expert_misses_total") * 3 * 64 * 32 * 4
    assert after["planaria_answers_waiting"] == after["planaria_answers_running"] == 0
    assert after["process_resident_memory_bytes"] > 1e7
    line = next(line for line in server.log if answer._request_id in line)
    assert "POST '/v1/completions' 200" in line
    assert "5 new tokens" in line
    assert "secret" not in "".join(server.log)
