"""Around the application: HTTP itself, request ids, the API key, counts of what was answered, and the log."""

from __future__ import annotations

import asyncio
import hmac
import json
import re
import sys
import time
import traceback
import uuid
from datetime import datetime

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from inference.server.app import BROKEN_BODY, CALL
from inference.server.engine_thread import Call
from inference.server.errors import bad_request, wrong_key
from inference.server.metrics import Metrics

# Labels of metrics: any other path is one that does not exist, and there is no end of those.
_PATHS = ("/v1/models", "/v1/completions", "/v1/chat/completions", "/health", "/metrics")


class Http(H11Protocol):
    """uvicorn's HTTP/1.1, which also refuses what is no HTTP in the API's shape, and ends connections that ask nothing.

    Where ``limit_concurrency`` connections are open, another takes the place of the one that has asked nothing for
    longest, or is closed if all wait for answers.

    Attributes:
        headers_s: seconds that a connection has for the headers of a request.
    """

    headers_s = 10.0
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()
        if self.limit_concurrency is not None and len(self.connections) >= self.limit_concurrency:
            waiting = [(c._deadline.when(), c) for c in self.connections if isinstance(c, Http) and c._deadline]
            min(waiting, key=lambda pair: pair[0])[1]._drop()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unwatch()

    def handle_events(self) -> None:
        super().handle_events()
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def _watch(self) -> None:
        """While no request is being answered, a deadline runs: uvicorn's own ends with the first byte."""
        asks_nothing = self.cycle is None or self.cycle.response_complete
        if not asks_nothing or self.transport.is_closing():
            self._unwatch()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.headers_s, self._drop)

    def _unwatch(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _drop(self) -> None:
        self._unwatch()
        self.connections.discard(self)  # at once: others that come in this turn of the loop count
        self.transport.abort()

    def eof_received(self) -> bool:  # type: ignore[override]
        """A client that closes its side midway in a body may still read the answer; others are gone."""
        midway = self.cycle is not None and self.cycle.more_body and not self.cycle.response_started
        if midway:
            self.data_received(b"")
        return midway

    def send_400_response(self, msg: str) -> None:
        if self.cycle is not None and not self.cycle.response_started:
            # In the middle of a body: whoever reads it is told, and answers.
            self.cycle.scope["state"][BROKEN_BODY] = True
            self.cycle.more_body = False
            self.cycle.message_event.set()
            return
        if self.cycle is None or self.cycle.response_complete:
            body = json.dumps(bad_request(msg, code="invalid_http").body).encode()
            self.transport.write(
                b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n"
                b"content-length: %d\r\n\r\n%s" % (len(body), body)
            )
        self.transport.close()


class Gate:
    """An ASGI application around another.

    Args:
        app: what is behind it.
        metrics: where requests are counted.
        api_key: what ``/v1`` asks for; None: nothing. ``/health`` and ``/metrics`` are open.
        log: write a line for each request, without what was asked or answered, to stderr.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, api_key: str | None, log: bool) -> None:
        self.app, self.metrics, self.api_key, self.log = app, metrics, api_key, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # Servers must understand the form that is meant for proxies: GET http://host/path.
        scope["path"] = re.sub(r"^https?://[^/]+", "", scope["path"])
        began, status = time.monotonic(), 0
        request_id = f"req_{uuid.uuid4().hex}"

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            if refusal := self._refusal(scope):
                await refusal(scope, receive, send_marked)
            else:
                await self.app(scope, receive, send_marked)
        except Exception:
            traceback.print_exc(file=sys.stderr)
            status = status or 500
        finally:
            self.metrics.requests.add(path=_label(scope["path"]), status=str(status))
            if self.log:
                print(_line(scope, request_id, status, time.monotonic() - began), file=sys.stderr, flush=True)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        if not {b"content-length", b"transfer-encoding"} - {name for name, _ in scope["headers"]}:
            # A proxy may believe the other one, and take what follows for somebody else's request.
            error = bad_request("The request has both Content-Length and Transfer-Encoding.", code="invalid_http")
            return JSONResponse(error.body, error.status, headers={"connection": "close"})
        if self.api_key is None or not scope["path"].startswith("/v1"):
            return None
        given = re.fullmatch(r"[Bb]earer +(\S+)", Headers(scope=scope).get("authorization", ""))
        if given and hmac.compare_digest(given[1].encode(), self.api_key.encode()):
            return None
        error = wrong_key(given is not None)
        return JSONResponse(error.body, error.status, headers={"www-authenticate": "Bearer"})


def _label(path: str) -> str:
    if path in _PATHS:
        return path
    return "/v1/models" if path.startswith("/v1/models/") else "other"


def _line(scope: Scope, request_id: str, status: int, seconds: float) -> str:
    when = datetime.now().isoformat(timespec="milliseconds")
    line = f"{when} {request_id} {scope['method']} {scope['path']!r} {status} {seconds:.3f} s"
    call = scope.get(CALL)
    if isinstance(call, Call):
        first = "none" if call.first_token_s is None else f"{call.first_token_s:.3f} s"
        line += f", {len(call.index)} answers, {call.new_tokens} new tokens, first after {first}"
    return line
