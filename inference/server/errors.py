"""Errors as the OpenAI API shows them: a status, and ``{"error": {message, type, param, code}}``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

INVALID, OVERLOADED, SERVER = "invalid_request_error", "rate_limit_error", "server_error"
_LONGEST = 1000


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        message: what is wrong and what to do about it.
        param: the field that is wrong, if it is one.
        code: a word for programs.
        kind: the ``type`` of the body.
        retry_after_s: when asking again may help; sent as a header.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = INVALID,
        retry_after_s: int | None = None,
    ) -> None:
        message, param = _shortened(message), param and _shortened(param)
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.kind = status, message, param, code, kind
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> Mapping[str, str]:
        return {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}


def _shortened(text: str) -> str:
    """Texts that repeat what the client sent, which may be megabytes."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def wrong_key(given: bool) -> ApiError:
    message = (
        "Incorrect API key provided; give the one that the server was started with."
        if given
        else "You didn't provide an API key. Send it in a header: Authorization: Bearer YOUR_KEY."
    )
    return ApiError(401, message, code="invalid_api_key")


def no_such_model(name: str, known: tuple[str, ...]) -> ApiError:
    return ApiError(
        404,
        f"The model '{name}' does not exist; this server has {', '.join(known)}.",
        param="model",
        code="model_not_found",
    )


def no_such_url(method: str, path: str) -> ApiError:
    return ApiError(404, f"Invalid URL ({method} {path})", code="unknown_url")


def wrong_method(method: str, path: str) -> ApiError:
    return ApiError(405, f"Not allowed to {method} on {path}; use the other method.", code="method_not_supported")


def too_large(limit: int) -> ApiError:
    return ApiError(413, f"The request's body is larger than {limit} bytes; send less.", code="request_too_large")


def body_too_slow(seconds: float) -> ApiError:
    return ApiError(408, f"The request's body did not arrive within {seconds:g} s.", code="request_timeout")


def wrong_kind(message: str) -> ApiError:
    return ApiError(415, message, code="unsupported_media_type")


def queue_full(limit: int) -> ApiError:
    return ApiError(
        429,
        f"{limit} answers are waiting already, which is this server's limit; try again later.",
        code="rate_limit_exceeded",
        kind=OVERLOADED,
        retry_after_s=1,
    )


def shutting_down() -> ApiError:
    return ApiError(
        503, "The server is shutting down; try again later.", code="shutting_down", kind=SERVER, retry_after_s=5
    )


def engine_failed(why: str) -> ApiError:
    return ApiError(500, f"The engine failed: {why}", code="engine_failed", kind=SERVER)


def context_too_long(limit: int, prompt: int, new: int, param: str) -> ApiError:
    what = "messages" if param == "messages" else "prompt"
    return ApiError(
        400,
        f"This model's maximum context length is {limit} tokens. However, you requested {prompt + new} tokens "
        f"({prompt} in the {what}, {new} in the completion). Please reduce the length of the {what} or completion.",
        param=param,
        code="context_length_exceeded",
    )
