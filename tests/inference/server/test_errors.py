"""Whatever is wrong with a request is said in OpenAI's shape."""

from __future__ import annotations

import json
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")

from inference.server.errors import ApiError
from inference.server.fields import ChatRequest, CompletionRequest, parse

TEXT = {"model": "tiny", "prompt": "a", "max_tokens": 1}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_completion_tokens": 1}


def message(**fields):
    return {"messages": [{"role": "user", "content": "a"} | fields]}


# what is put over a good body, the param and the code of the error
BAD_TEXT = [
    ({"prompt": ...}, "prompt", "missing_required_parameter"),
    ({"model": ...}, "model", "missing_required_parameter"),
    ({"model": 3}, "model", "invalid_type"),
    ({"model": "other"}, "model", "model_not_found"),
    ({"model": "tiny:other"}, "model", "model_not_found"),
    ({"prompt": ""}, "prompt", "invalid_value"),
    ({"prompt": []}, "prompt", "invalid_value"),
    ({"prompt": [[]]}, "prompt", "invalid_value"),
    ({"prompt": ["a", ""]}, "prompt", "invalid_value"),
    ({"prompt": {}}, "prompt", "invalid_type"),
    ({"prompt": [1, "a"]}, "prompt", "invalid_type"),
    ({"prompt": [True]}, "prompt", "invalid_type"),
    ({"prompt": [512]}, "prompt", "invalid_value"),
    ({"prompt": [-1]}, "prompt", "invalid_value"),
    ({"prompt": ["a"] * 21}, "prompt", "too_many_answers"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"max_tokens": 1.5}, "max_tokens", "invalid_type"),
    ({"max_tokens": "1"}, "max_tokens", "invalid_type"),
    ({"max_tokens": True}, "max_tokens", "invalid_type"),
    ({"max_tokens": 10**30}, "prompt", "context_length_exceeded"),
    ({"temperature": "1"}, "temperature", "invalid_type"),
    ({"temperature": -0.1}, "temperature", "invalid_value"),
    ({"temperature": 2.1}, "temperature", "invalid_value"),
    ({"temperature": float("nan")}, "temperature", "invalid_value"),
    ({"temperature": float("inf")}, "temperature", "invalid_value"),
    ({"top_p": 0}, "top_p", "invalid_value"),
    ({"top_p": 1.1}, "top_p", "invalid_value"),
    ({"top_k": -2}, "top_k", "invalid_value"),
    ({"min_p": 2}, "min_p", "invalid_value"),
    ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
    ({"presence_penalty": 3}, "presence_penalty", "invalid_value"),
    ({"frequency_penalty": -3}, "frequency_penalty", "invalid_value"),
    ({"n": 0}, "n", "invalid_value"),
    ({"n": 129}, "n", "invalid_value"),
    ({"seed": 1.5}, "seed", "invalid_type"),
    ({"seed": 2**63}, "seed", "invalid_value"),
    ({"seed": 2**63 - 1, "n": 2}, "seed", "invalid_value"),
    ({"stop": 3}, "stop", "invalid_type"),
    ({"stop": ""}, "stop", "invalid_value"),
    ({"stop": ["a", 1]}, "stop", "invalid_type"),
    ({"stop": list("abcde")}, "stop", "invalid_type"),
    ({"stop_token_ids": [512]}, "stop_token_ids", None),
    ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"512": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1", "invalid_value"),
    ({"logit_bias": [1]}, "logit_bias", "invalid_type"),
    ({"logprobs": 6}, "logprobs", "invalid_value"),
    ({"logprobs": True}, "logprobs", "invalid_type"),
    ({"stream": "yes"}, "stream", "invalid_type"),
    ({"stream_options": {"include_usage": True}}, "stream_options", None),
    ({"stream": True, "stream_options": {"other": 1}}, "stream_options.other", "unknown_parameter"),
    ({"temperture": 1}, "temperture", "unknown_parameter"),
    ({"str": 1}, "str", "unknown_parameter"),
    ({"messages": []}, "messages", "unknown_parameter"),
    ({"echo": True}, "echo", "unsupported_parameter"),
    ({"suffix": "b"}, "suffix", "unsupported_parameter"),
    ({"best_of": 2}, "best_of", "unsupported_parameter"),
]
BAD_CHAT = [
    ({"messages": ...}, "messages", "missing_required_parameter"),
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": "a"}, "messages", "invalid_type"),
    ({"messages": ["a"]}, "messages[0]", "invalid_type"),
    ({"messages": [{"content": "a"}]}, "messages[0].role", "missing_required_parameter"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "invalid_value"),
    (message(role="king"), "messages[0].role", "invalid_value"),
    (message(role="tool", tool_call_id="x"), "messages[0]", "unsupported_value"),
    (message(content=3), "messages[0].content", "invalid_type"),
    (
        message(content=[{"type": "image_url", "image_url": {"url": "x"}}]),
        "messages[0].content[0]",
        "unsupported_value",
    ),
    (message(content=[{"type": "text", "text": 3}]), "messages[0].content[0].text", "invalid_type"),
    (message(content="\U0010f000"), "messages", None),
    (message(mood="good"), "messages[0].mood", "unknown_parameter"),
    ({"max_tokens": 1}, "max_tokens", "invalid_value"),  # both of them
    ({"max_completion_tokens": -1}, "max_completion_tokens", "invalid_value"),
    ({"max_completion_tokens": 10**6}, "messages", "context_length_exceeded"),
    ({"logprobs": 3}, "logprobs", "invalid_type"),
    ({"top_logprobs": 2}, "top_logprobs", None),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
    ({"n": 21}, "n", "too_many_answers"),
    ({"prompt": "a"}, "prompt", "unknown_parameter"),
    *(
        ({name: value}, name, "unsupported_parameter")
        for name, value in {
            "tools": [{"type": "function"}],
            "tool_choice": "required",
            "functions": [{}],
            "function_call": "auto",
            "response_format": {"type": "json_object"},
            "modalities": ["audio"],
            "audio": {"voice": "x"},
            "prediction": {"type": "content"},
            "reasoning_effort": "high",
            "service_tier": "flex",
            "store": True,
            "verbosity": "high",
            "web_search_options": {"a": 1},
            "parallel_tool_calls": "x",
            "moderation": {"a": 1},
        }.items()
    ),
]


def over(good, change):
    return {key: value for key, value in (good | change).items() if value is not ...}


def check_shape(body):
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    assert body["error"]["type"]


@pytest.mark.parametrize(("change", "param", "code"), BAD_TEXT, ids=lambda v: str(v)[:40])
def test_a_bad_completion_request(server, change, param, code):
    status, headers, body = server.post("/v1/completions", over(TEXT, change))
    check_shape(body)
    assert (body["error"]["param"], body["error"]["code"]) == (param, code)
    assert status == (404 if code == "model_not_found" else 400)
    assert body["error"]["type"] == "invalid_request_error"
    assert headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(("change", "param", "code"), BAD_CHAT, ids=lambda v: str(v)[:40])
def test_a_bad_chat_request(server, change, param, code):
    status, _, body = server.post("/v1/chat/completions", over(CHAT, change))
    check_shape(body)
    assert (body["error"]["param"], body["error"]["code"]) == (param, code)
    assert status == 400


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"null", b"[]", b"3", b'"a"', b'{"a": \xff}', b'{"prompt": "\\ud800"}', b"[" * 90_000, b"{}}", b"a=b"],
    ids=repr,
)
def test_a_body_that_is_no_json_object(server, body):
    status, _, answer = server.post("/v1/completions", body)
    check_shape(answer)
    assert (status, answer["error"]["code"]) == (400, "invalid_json")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "unknown_url"),
        ("GET", "/v1", 404, "unknown_url"),
        ("POST", "/v1/embeddings", 404, "unknown_url"),
        ("GET", "/v1/chat/completions/", 404, "unknown_url"),
        ("GET", "/docs", 404, "unknown_url"),
        ("GET", "/v1/models/nobody/knows", 404, "model_not_found"),
        ("GET", "/v1/completions", 405, "method_not_supported"),
        ("DELETE", "/v1/models", 405, "method_not_supported"),
        ("POST", "/health", 405, "method_not_supported"),
    ],
)
def test_a_url_that_is_not_there(server, method, path, status, code):
    found, _, body = server.raw(method, path)
    check_shape(json.loads(body))
    assert (found, json.loads(body)["error"]["code"]) == (status, code)


def test_a_body_that_is_too_large_or_of_another_kind(server):
    status, _, body = server.post("/v1/completions", TEXT | {"prompt": "a" * 100_001})
    check_shape(body)
    assert (status, body["error"]["code"]) == (413, "request_too_large")
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        status, _, body = server.raw("POST", "/v1/completions", b"{}", **{"content-type": kind})
        check_shape(json.loads(body))
        assert (status, json.loads(body)["error"]["code"]) == (415, "unsupported_media_type")
    with server.open_request("/v1/completions", TEXT) as connection:
        assert connection.recv(12) == b"HTTP/1.1 200"


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00",
        b"hello\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: many\r\n\r\n",
    ],
    ids=repr,
)
def test_what_is_no_http(server, sent):
    head, body = talk(server, sent)
    assert head.startswith("HTTP/1.1 400 ")
    check_shape(json.loads(body))


def talk(server, sent, half_closed=False):
    """Sends bytes as they are; head and body of all that is answered until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(sent)
        if half_closed:
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        while part := connection.recv(4096):
            answer += part
    head, _, body = answer.decode().partition("\r\n\r\n")
    return head, body


POST = "POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer KEY\r\ncontent-type: application/json\r\n"
IN_CHUNKS = f"{POST}transfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("sent", "half_closed"),
    [
        (IN_CHUNKS + "ZZ\r\n{}\r\n0\r\n\r\n", False),
        (IN_CHUNKS + "-2\r\n{}\r\n0\r\n\r\n", False),
        (IN_CHUNKS + "1\r\n{}\r\n0\r\n\r\n", False),  # more than it says
        (IN_CHUNKS + "2\r\n{}\r\nzz\r\n", False),
        (IN_CHUNKS + "f" * 30 + "\r\n{}", False),
        (IN_CHUNKS + "0" * 100_000, False),
        (IN_CHUNKS + "0\r\nno trailer\r\n\r\n", False),
        (IN_CHUNKS + "20\r\n{}", True),
        (f"{POST}content-length: 20\r\n\r\n{{", True),
        (f"{POST}content-length: -5\r\n\r\n{{}}", False),
        (f"{POST}content-length: 2\r\ncontent-length: 3\r\n\r\n{{}}", False),
        (f"{POST}content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{{}}\r\n0\r\n\r\nGET /health", False),
    ],
    ids=lambda value: repr(value)[-40:],
)
def test_a_broken_body_is_refused_and_its_connection_closed(server, sent, half_closed):
    head, body = talk(server, sent.replace("KEY", server.key).encode(), half_closed)
    assert head.startswith("HTTP/1.1 400 ")
    check_shape(json.loads(body))
    assert json.loads(body)["error"]["code"] == "invalid_http"


def test_a_broken_body_is_counted_as_what_was_answered(server):
    name = 'planaria_requests_total{path="/v1/completions",status="400"}'
    before = server.metrics().get(name, 0)
    head, _ = talk(server, f"{IN_CHUNKS}ZZ\r\n".replace("KEY", server.key).encode())
    assert "x-request-id: req_" in head
    server.until(lambda m: m.get(name, 0) == before + 1)


def test_a_body_that_is_packed_is_refused(server):
    status, _, body = server.raw(
        "POST", "/v1/completions", b"x", **{"content-type": "application/json", "content-encoding": "gzip"}
    )
    assert (status, json.loads(body)["error"]["code"]) == (415, "unsupported_media_type")


def test_a_url_in_the_form_for_proxies_is_understood_and_asks_for_the_key(server):
    assert server.raw("GET", f"http://127.0.0.1:{server.port}/v1/models")[0] == 200
    head, _ = talk(server, b"GET http://x/v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    assert head.startswith("HTTP/1.1 401 ")


def test_what_a_client_sent_is_not_repeated_at_length(server):
    for wrong in ({"a" * 50_000: 1}, {"stop_token_ids": [int("9" * 4000)]}):
        _, _, body = server.post("/v1/completions", TEXT | wrong)
        check_shape(body)
        assert len(json.dumps(body)) < 3000


def test_a_body_in_chunks_is_held_to_the_same_limit(server):
    def chunks():
        for _ in range(20):
            yield b"a" * 10_000

    status, _, body = server.raw("POST", "/v1/completions", chunks(), **{"content-type": "application/json"})
    assert (status, json.loads(body)["error"]["code"]) == (413, "request_too_large")


def test_what_asks_for_nothing_is_taken(server):
    nothing = dict.fromkeys(("stop", "seed", "n", "user", "logit_bias", "stream_options", "best_of", "suffix", "top_p"))
    assert server.post("/v1/completions", TEXT | nothing | {"echo": False, "user": "me"})[0] == 200
    nothing = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"]}
    ignored = {"metadata": {"a": "b"}, "store": False, "service_tier": "auto", "prompt_cache_key": "x"}
    assert server.post("/v1/chat/completions", CHAT | nothing | ignored)[0] == 200


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60)
@given(st.data())
def test_any_value_of_any_field_is_taken_or_refused_with_a_shape(data):
    kind, good = data.draw(st.sampled_from([(CompletionRequest, TEXT), (ChatRequest, CHAT)]))
    changes = data.draw(st.dictionaries(st.sampled_from(sorted(kind.model_fields)), anything, max_size=3))
    try:
        asked = parse(kind, json.dumps(good | changes).encode())
        asked.sampling(512, None)
        if isinstance(asked, ChatRequest):
            assert all(isinstance(m.text("m"), str) for m in asked.messages)
        else:
            assert asked.prompts()
    except ApiError as error:
        check_shape(json.loads(json.dumps(error.body)))
