"""The HTTP side: routes, bodies, streams. What a request means is :mod:`inference.server.service`'s affair."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from inference.requests import Output
from inference.server.errors import (
    SERVER,
    ApiError,
    bad_request,
    body_too_slow,
    no_such_model,
    no_such_url,
    too_large,
    wrong_kind,
    wrong_method,
)
from inference.server.fields import ChatRequest, CompletionRequest, parse
from inference.server.service import Job, Service

_Result = TypeVar("_Result")
CALL = "planaria_call"  # where the scope of a connection keeps what was handed to the engine
BROKEN_BODY = "planaria_broken_body"  # is in its state if the body is no HTTP, or ends too early


class ClientGone(Exception):
    """The client closed its connection; nobody reads the answer."""


@dataclass(frozen=True)
class Limits:
    """Of a request's body: bytes, and seconds until it has arrived."""

    body_bytes: int
    body_s: float


def make_app(service: Service, limits: Limits) -> FastAPI:
    """The application; it starts and ends the engine's thread."""

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        await asyncio.to_thread(service.engine.stop)

    app = FastAPI(
        lifespan=life,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        exception_handlers={ApiError: _refused, HTTPException: _no_route, ClientGone: _nobody, Exception: _broken},
    )
    _add_models(app, service)
    _add_observation(app, service)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _generate(service, limits, request, CompletionRequest)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await _generate(service, limits, request, ChatRequest)

    return app


def _add_models(app: FastAPI, service: Service) -> None:
    def card(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": service.started, "owned_by": "planaria"}

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [card(name) for name in service.served.models]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name not in service.served.models:
            raise no_such_model(name, service.served.models)
        return JSONResponse(card(name))


def _add_observation(app: FastAPI, service: Service) -> None:
    engine = service.engine

    @app.api_route("/health", methods=["GET", "HEAD"])  # some probes ask for the head alone
    async def health() -> Response:
        if reason := engine.failure or engine.hanging or engine.trouble:
            return JSONResponse({"status": "failed", "reason": reason}, 503)
        if engine.draining:
            return JSONResponse({"status": "shutting down"}, 503)
        return JSONResponse({"status": "ok", "waiting": engine.waiting, "running": engine.running})

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(engine.metrics.text(), media_type="text/plain; version=0.0.4")


async def _generate(
    service: Service, limits: Limits, request: Request, kind: type[CompletionRequest] | type[ChatRequest]
) -> Response:
    arrived = time.monotonic()
    asked = parse(kind, await _body(request, limits))
    job = await service.begin(asked, arrived)
    request.scope[CALL] = job.call
    try:
        events = job.call.events()
        if not asked.stream:
            await _while_connected(request, _collect(job, events))
            return JSONResponse(job.frame.whole(job.choices, job.prompt_tokens))
        # A failure before the first token still gets a status of its own.
        first = await _while_connected(request, anext(events))
    except ApiError:
        service.engine.cancel(job.call)  # what the others of several answers had begun
        raise
    except BaseException:
        service.give_up(job)
        raise
    return EventStream(_stream(job, first, events), lambda: service.give_up(job))


async def _collect(job: Job, events: AsyncIterator[tuple[int, Output]]) -> None:
    async for index, output in events:
        job.choices[index].add(output)


async def _stream(job: Job, first: tuple[int, Output], events: AsyncIterator[tuple[int, Output]]) -> AsyncIterator[str]:
    """Server-sent events: for each answer its opening, what it gains and its closing; then the usage and ``[DONE]``."""

    async def all_events() -> AsyncIterator[tuple[int, Output]]:
        yield first
        async for event in events:
            yield event

    frame, opened = job.frame, set()
    try:
        async for index, output in all_events():
            choice = job.choices[index]
            choice.add(output)
            if index not in opened:
                opened.add(index)
                if opening := frame.opening(index):
                    yield _event(opening)
            if piece := frame.piece(index, output, choice):
                yield _event(piece)
            if choice.finish is not None:
                yield _event(frame.closing(index, choice))
    except ApiError as error:  # the status is sent already; openai's client raises for this event
        yield _event(error.body)
        return
    if frame.wants_usage:
        yield _event(frame.last(job.choices, job.prompt_tokens))
    yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, separators=(',', ':'), allow_nan=False)}\n\n"


class EventStream(StreamingResponse):
    """Calls ``end`` when the stream has ended or its client has gone, even if it never began."""

    def __init__(self, content: AsyncIterator[str], end: Callable[[], None]) -> None:
        super().__init__(content, headers={"cache-control": "no-cache"}, media_type="text/event-stream")
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()


async def _body(request: Request, limits: Limits) -> bytes:
    """Raises ApiError if it is no JSON by its header, too large, too slow or broken."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Also what keeps a web page from using a server on its visitor's machine: browsers ask before they send this.
        raise wrong_kind(f"The request's Content-Type is {kind or 'missing'}; send application/json.")
    coding = request.headers.get("content-encoding", "identity")
    if coding.strip().lower() != "identity":
        raise wrong_kind(f"The request's Content-Encoding is {coding}; send it as it is.")
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdecimal() and int(length[:20]) > limits.body_bytes:
        raise too_large(limits.body_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.body_bytes:
                    raise too_large(limits.body_bytes)
    except TimeoutError as error:
        raise body_too_slow(limits.body_s) from error
    except ClientDisconnect as error:
        raise ClientGone from error
    if request.scope["state"].get(BROKEN_BODY):
        raise bad_request("The request's body is cut short, or its chunks are malformed.", code="invalid_http")
    return bytes(body)


async def _while_connected(request: Request, work: Awaitable[_Result]) -> _Result:
    """The result of ``work``, which is cancelled with ClientGone as soon as the client closes its connection."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, headers=dict(error.headers))


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    make = wrong_method if error.status_code == 405 else no_such_url
    refusal = make(request.method, request.url.path)
    return JSONResponse(refusal.body, refusal.status, headers=error.headers)


async def _nobody(_: Request, __: Exception) -> Response:
    return Response(status_code=499)


async def _broken(_: Request, __: Exception) -> Response:
    error = ApiError(500, "The server made a mistake; its log says more.", code="internal_error", kind=SERVER)
    return JSONResponse(error.body, 500)
