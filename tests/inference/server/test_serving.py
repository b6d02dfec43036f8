"""What the server does with an engine that is slow, full, failing or about to end; the engine does as it is told."""

from __future__ import annotations

import io
import json
import signal
import socket
import sys
import threading

import pytest

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
openai = pytest.importorskip("openai", reason="the extra 'dev' is not installed")

from inference.errors import InferenceError, RequestError  # noqa: E402
from inference.server.gate import Http  # noqa: E402
from inference.server.serve import _listen, _most_connections, _say_ready, _status  # noqa: E402

PLAIN = {"model": "tiny", "prompt": [2, 3], "max_tokens": 4}


def in_thread(work):
    """Runs ``work`` beside the test; the function that is returned waits for its result."""
    results = []

    def run():
        try:
            results.append(work())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def result():
        thread.join(timeout=30)
        assert results, "no answer: it hangs"
        return results[0]

    return result


def running(address, count):
    address.until(lambda m: m["planaria_answers_waiting"] + m["planaria_answers_running"] == count)


def begun_stream(engine, address, count):
    """A stream of which the first token was read. It is the ``count``-th answer of the server."""
    opened = in_thread(lambda: iter(address.client().completions.create(**PLAIN, stream=True)))
    running(address, count)
    engine.allow(1)
    stream = opened()
    assert next(stream).choices[0].text == "A"
    return stream


def test_an_engine_that_dies_fails_requests_and_health_instead_of_hanging(told, capfd):
    engine, address, _ = told()
    assert address.raw("GET", "/health")[0] == address.raw("HEAD", "/health")[0] == 200
    first = in_thread(lambda: address.post("/v1/completions", PLAIN))
    running(address, 1)
    stream = begun_stream(engine, address, 2)
    engine.raises = MemoryError("no room")
    status, _, body = first()
    assert status == 500
    assert body["error"]["type"] == "server_error"
    assert "MemoryError" in body["error"]["message"]
    with pytest.raises(openai.APIError, match="The engine failed"):
        list(stream)
    status, _, text = address.raw("GET", "/health")
    assert (status, json.loads(text)["status"]) == (503, "failed")
    assert address.post("/v1/completions", PLAIN)[0] == 500
    assert "MemoryError: no room" in capfd.readouterr().err


def test_an_engine_that_is_dead_does_not_hang(told, capfd):
    engine, address, server = told(step_s=0.2, exit_when_hung=True)
    engine.raises = MemoryError("no room")
    assert address.post("/v1/completions", PLAIN)[0] == 500
    for _ in range(20):  # more looks than a step of 0.2 s lasts, however long they are apart
        server.engine._ticker._last -= 3600
        server.engine.look()
    assert server.engine.hanging is None
    assert "hangs" not in capfd.readouterr().err
    assert json.loads(address.raw("GET", "/health")[2])["reason"].startswith("MemoryError")


def test_an_answer_that_fails_alone_is_a_500_and_a_good_one_mends_the_health(told):
    engine, address, _ = told()
    engine.fails = "a bad expert"
    engine.allow(1)
    status, _, body = address.post("/v1/completions", PLAIN)
    assert status == 500
    assert "a bad expert" in body["error"]["message"]
    assert address.raw("GET", "/health")[0] == 503
    engine.fails = None
    engine.allow(4)
    assert address.post("/v1/completions", PLAIN)[2]["choices"][0]["text"] == "AAAA"
    assert address.raw("GET", "/health")[0] == 200


def test_a_step_that_hangs_ends_its_requests_and_may_end_after_all(told, capfd):
    engine, address, _ = told(step_s=0.2)
    stream = begun_stream(engine, address, 1)
    engine.let_go.clear()
    status, _, body = address.post("/v1/completions", PLAIN)
    assert (status, body["error"]["code"]) == (500, "engine_failed")
    assert "and hangs" in body["error"]["message"]
    with pytest.raises(openai.APIError, match="and hangs"):
        list(stream)
    status, _, text = address.raw("GET", "/health")
    assert (status, json.loads(text)["status"]) == (503, "failed")
    assert "hangs" in json.loads(text)["reason"]
    assert address.post("/v1/completions", PLAIN)[0] == 500
    errors = capfd.readouterr().err
    assert errors.count("the engine hangs") == 1
    assert "self.let_go.wait()" in errors
    engine.let_go.set()
    address.until(lambda _: address.raw("GET", "/health")[0] == 200)
    engine.allow(4)
    assert address.post("/v1/completions", PLAIN)[2]["choices"][0]["text"] == "AAAA"


def test_time_in_which_nobody_looked_hangs_nothing(told):
    engine, address, server = told(step_s=3000.0)
    engine.let_go.clear()
    waiting = in_thread(lambda: address.post("/v1/completions", PLAIN))
    running(address, 1)
    server.engine._ticker._last -= 3600  # as after an hour in which the process was stopped
    address.until(lambda _: server.engine._step_age_s > 0.5)
    assert server.engine.hanging is None
    engine.let_go.set()
    engine.allow(4)
    assert waiting()[0] == 200


def test_a_server_whose_engine_hangs_may_end_without_it(told, monkeypatch, capfd):
    engine, address, server = told(step_s=0.2, exit_when_hung=True)
    engine.let_go.clear()
    assert address.post("/v1/completions", PLAIN)[0] == 500
    server.thread.join(timeout=10)
    assert not server.thread.is_alive()
    ended = []
    monkeypatch.setattr("os._exit", ended.append)
    _status(server.engine)
    assert ended == [1]  # not a return, behind which the model would be closed
    assert "the process ends without it" in capfd.readouterr().err


def test_told_to_end_it_does_not_wait_for_a_step_that_hangs(told, monkeypatch):
    monkeypatch.setattr("inference.server.engine_thread._HUNG_S", 0.2)
    engine, address, server = told(drain_s=0.0)
    engine.let_go.clear()
    answer = in_thread(lambda: address.post("/v1/completions", PLAIN))
    running(address, 1)
    signalled(server)
    assert answer()[2]["error"]["code"] == "engine_failed"
    server.thread.join(timeout=10)
    assert not server.thread.is_alive()


def test_a_full_queue_refuses_with_429_and_takes_again_later(told):
    engine, address, _ = told(max_queue=2)
    waiting = in_thread(lambda: address.post("/v1/completions", PLAIN | {"n": 2}))
    running(address, 2)
    with pytest.raises(openai.RateLimitError, match="2 answers are waiting") as refused:
        address.client().completions.create(**PLAIN)
    assert refused.value.response.headers["retry-after"] == "1"
    status, _, body = address.post("/v1/completions", PLAIN | {"n": 3})
    assert (status, body["error"]["param"]) == (400, "n")  # it would never fit
    engine.allow(4)
    assert [choice["text"] for choice in waiting()[2]["choices"]] == ["AAAA", "AAAA"]
    engine.allow(4)
    assert address.post("/v1/completions", PLAIN)[0] == 200


def test_of_several_answers_all_are_taken_or_none(told):
    engine, address, _ = told()
    engine.refuses = RequestError("prompt_ids", "too long for the cache")
    status, _, body = address.post("/v1/completions", PLAIN | {"prompt": [[2], [3], [1]]})
    assert (status, body["error"]["param"]) == (400, "prompt")
    assert "too long for the cache" in body["error"]["message"]
    metrics = address.metrics()
    assert metrics["planaria_answers_waiting"] == metrics["planaria_prompt_tokens_total"] == 0
    engine.allow(4)
    assert address.post("/v1/completions", PLAIN)[0] == 200
    assert len(engine.cancelled) == 2


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tokens_before", [0, 2])
def test_a_client_that_vanishes_is_cancelled_in_the_next_step(told, stream, tokens_before):
    engine, address, _ = told()
    with address.open_request("/v1/completions", PLAIN | {"max_tokens": 100, "n": 2, "stream": stream}):
        running(address, 2)
        engine.allow(tokens_before)
        address.until(lambda m: m["planaria_new_tokens_total"] == 2 * tokens_before)
    metrics = address.until(lambda m: m["planaria_cancelled_total"] == 1)
    assert metrics["planaria_answers_waiting"] == metrics["planaria_answers_running"] == 0
    engine.allow(1)
    address.until(lambda _: not engine.has_work())
    assert len(engine.cancelled) == 2
    assert max(engine.made.values()) == tokens_before


def test_told_to_end_it_finishes_what_it_has_and_takes_no_more(told):
    engine, address, server = told()
    open_answer = in_thread(lambda: address.post("/v1/completions", PLAIN))
    running(address, 1)
    stream = begun_stream(engine, address, 2)
    server.handle_exit(signal.SIGTERM, None)
    assert address.raw("GET", "/health")[0] == 503  # a balancer is told before the port is gone
    with pytest.raises(openai.InternalServerError, match="shutting down") as refused:
        address.client().completions.create(**PLAIN)
    assert refused.value.status_code == 503
    engine.allow(3)
    assert open_answer()[2]["choices"][0]["text"] == "AAAA"
    assert "".join(piece.choices[0].text for piece in stream) == "AAA"


def test_what_is_not_finished_by_the_deadline_fails_with_a_shape(told):
    engine, address, server = told(drain_s=0.0)
    open_answer = in_thread(lambda: address.post("/v1/completions", PLAIN))
    running(address, 1)
    stream = begun_stream(engine, address, 2)
    server.handle_exit(signal.SIGTERM, None)
    status, _, body = open_answer()
    assert (status, body["error"]["code"]) == (503, "shutting_down")
    with pytest.raises(openai.APIError, match="shutting down"):
        list(stream)


def signalled(server):
    """As the process gets it: in the thread that runs the server."""
    server.loop.call_soon_threadsafe(server.handle_exit, signal.SIGTERM, None)


def test_a_second_signal_ends_what_the_first_one_waits_for(told):
    _, address, server = told(drain_s=3600.0)
    open_answer = in_thread(lambda: address.post("/v1/completions", PLAIN))
    running(address, 1)
    signalled(server)
    address.until(lambda _: server.engine.draining)
    assert address.raw("GET", "/health")[0] == 503
    signalled(server)
    assert open_answer()[2]["error"]["code"] == "shutting_down"


def test_a_client_that_does_not_read_is_cut_off_at_the_end_without_a_traceback(told, capfd, monkeypatch):
    monkeypatch.setattr("inference.server.serve._AFTER_DRAIN_S", 0.2)
    engine, address, server = told(drain_s=0.0)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", address.port))
        body = json.dumps(PLAIN | {"max_tokens": 199, "n": 20, "stream": True})
        connection.sendall(
            f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {address.key}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()
        )
        running(address, 20)
        engine.allow(198)
        address.until(lambda m: m["planaria_new_tokens_total"] == 20 * 198)
        signalled(server)
        server.thread.join(timeout=20)
        assert not server.thread.is_alive()
    errors = capfd.readouterr().err
    assert "1 connections did not end in time" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nhost:", b"GET /health HTTP/1.1\r\nhost: x\r\n\r\nGET"])
def test_a_connection_that_asks_nothing_is_closed(told, monkeypatch, sent):
    monkeypatch.setattr(Http, "headers_s", 0.2)
    _, address, _ = told()
    with socket.create_connection(("127.0.0.1", address.port), timeout=30) as connection:
        connection.sendall(sent)
        received = b""
        try:
            while piece := connection.recv(4096):
                received += piece
        except ConnectionResetError:
            pass
        assert received.count(b"HTTP/1.1 200") == sent.count(b"\r\n\r\n")


def test_silent_connections_do_not_take_the_server_away(told, monkeypatch):
    monkeypatch.setattr("inference.server.serve._most_connections", lambda: 4)
    engine, address, _ = told()
    open_answer = in_thread(lambda: address.post("/v1/completions", PLAIN))
    running(address, 1)
    silent = [socket.create_connection(("127.0.0.1", address.port), timeout=30) for _ in range(40)]
    assert address.raw("GET", "/health")[0] == 200
    engine.allow(4)
    assert open_answer()[0] == 200  # one that waits for its answer is none of them
    for connection in silent:
        connection.close()


def test_the_limit_of_open_files_is_said_when_it_leaves_no_room(monkeypatch):
    monkeypatch.setattr("resource.getrlimit", lambda _: (60, 60))
    with pytest.raises(InferenceError, match="ulimit -n"):
        _most_connections()


def test_a_port_that_is_in_use_is_said_at_once():
    taken = _listen("127.0.0.1", 0)
    with taken, pytest.raises(InferenceError, match="give another --host or --port"):
        _listen("127.0.0.1", taken.getsockname()[1])


def test_a_ready_line_that_nobody_can_read_is_no_reason_not_to_serve(monkeypatch, capfd):
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(full, write_through=True))
        _say_ready("ready: http://x")
        monkeypatch.undo()
    assert capfd.readouterr().err == "standard output: No space left on device; ready: http://x\n"


def test_a_mistake_of_the_server_itself_is_a_500_with_a_shape(told, capfd):
    engine, address, _ = told()
    engine.refuses = ZeroDivisionError("ours")
    status, headers, body = address.post("/v1/completions", PLAIN | {"prompt": [1]})
    assert (status, body["error"]["code"]) == (500, "internal_error")
    assert headers["x-request-id"].startswith("req_")
    assert "ours" not in body["error"]["message"]
    address.until(lambda m: m.get('planaria_requests_total{path="/v1/completions",status="500"}') == 1)
    assert "ZeroDivisionError: ours" in capfd.readouterr().err


def test_a_body_that_does_not_arrive_is_not_waited_for(told):
    _, address, _ = told(body_s=0.1)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {address.key}\r\n"
    head += "content-type: application/json\r\ncontent-length: 10\r\n\r\n"
    with socket.create_connection(("127.0.0.1", address.port), timeout=30) as connection:
        connection.sendall(head.encode() + b"{")
        assert connection.recv(12) == b"HTTP/1.1 408"


def test_times_of_tokens_are_counted_once_for_each(told):
    engine, address, _ = told()
    engine.allow(4)
    address.post("/v1/completions", PLAIN | {"n": 3})
    metrics = address.metrics()
    assert metrics["planaria_new_tokens_total"] == 12
    assert metrics["planaria_prompt_tokens_total"] == 2
    assert metrics["planaria_time_to_first_token_seconds_count"] == 3
    assert metrics["planaria_inter_token_seconds_count"] == 9
    assert metrics['planaria_inter_token_seconds_bucket{le="+Inf"}'] == 9
    assert metrics['planaria_requests_total{path="/v1/completions",status="200"}'] == 1


def test_a_template_that_is_broken_is_refused_before_the_server_is_ready(chat_folder, tmp_path, capsys, monkeypatch):
    from trainer.cli import main

    monkeypatch.setattr("inference.server.serve.Server.run", lambda *_, **__: pytest.fail("it is ready"))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    (tmp_path / "broken.j").write_text("{% for m in messages %}")
    assert main(["serve", str(chat_folder), "--port", "0", "--chat-template", str(tmp_path / "broken.j")]) == 2
    assert "chat template refuses" in capsys.readouterr().err
