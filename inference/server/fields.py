"""What a request's body may hold, as OpenAI defines it, and nothing else.

Every field of OpenAI's API is known here. Some are carried out, some change nothing and are ignored (``user``,
``metadata``, ...), and the others are refused by name unless their value asks for nothing. An unknown field is an
error, as it is at OpenAI: a misspelt ``temperture`` would change the answer without a word. Beyond OpenAI's there are
``top_k``, ``min_p``, ``repetition_penalty``, ``ignore_eos`` and ``stop_token_ids``, which openai's client sends in
``extra_body``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from inference.errors import RequestError
from inference.requests import SamplingParams
from inference.server.errors import ApiError, bad_request

MAX_CHOICES, MAX_STOPS, MAX_BIASES = 128, 4, 1024
Penalty = Annotated[float, Field(ge=-2, le=2)]
_NOTHING: tuple[Any, ...] = (None, [], {}, False, "")


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class StreamOptions(_Fields):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Generation(_Fields):
    """What both kinds of completions share. ``None`` means OpenAI's default, as if the field were not there."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES)] | None = (
        None
    )
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=1e-4, le=1e4)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None

    # field -> the values, beside null, false and empty ones, that ask for nothing
    _unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def check(self) -> None:
        """Raises ApiError for what the types cannot say."""
        for field, harmless in self._unsupported.items():
            value = getattr(self, field)
            if value not in _NOTHING and value not in harmless:
                raise bad_request(
                    f"Unsupported parameter: '{field}' is not supported by this server; leave it out.",
                    field,
                    "unsupported_parameter",
                )
        if self.stream_options is not None and not self.stream:
            raise bad_request("'stream_options' is only allowed when 'stream' is true.", "stream_options")

    def sampling(self, vocabulary: int, logprobs: int | None) -> list[SamplingParams]:
        """For each choice; with a seed, choice number i has ``seed + i``. Raises ApiError."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if wrong := [token for token in self.stop_token_ids or () if not 0 <= token < vocabulary]:
            raise bad_request(f"'stop_token_ids': {wrong[0]} is no token of this model.", "stop_token_ids")
        try:
            first = SamplingParams(
                temperature=_or(self.temperature, 1.0),
                top_p=_or(self.top_p, 1.0),
                top_k=max(_or(self.top_k, 0), 0),
                min_p=_or(self.min_p, 0.0),
                repetition_penalty=_or(self.repetition_penalty, 1.0),
                presence_penalty=_or(self.presence_penalty, 0.0),
                frequency_penalty=_or(self.frequency_penalty, 0.0),
                logit_bias=self._biases(vocabulary),
                seed=self.seed,
                stop=stop,
                stop_token_ids=tuple(self.stop_token_ids or ()),
                ignore_eos=bool(self.ignore_eos),
                logprobs=logprobs,
            )
            if self.seed is None:
                return [first] * self.choices
            return [replace(first, seed=self.seed + choice) for choice in range(self.choices)]
        except RequestError as error:
            raise bad_request(f"{error}.", error.field, "invalid_value") from error

    def _biases(self, vocabulary: int) -> tuple[tuple[int, float], ...]:
        biases = {}
        for text, bias in (self.logit_bias or {}).items():
            token = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else -1
            if not 0 <= token < vocabulary:
                raise bad_request(
                    f"Invalid key in 'logit_bias': {text!r} is no token id; this model's are 0 to {vocabulary - 1}.",
                    "logit_bias",
                    "invalid_value",
                )
            biases[token] = float(bias)
        return tuple(sorted(biases.items()))


class CompletionRequest(Generation):
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: Any = None
    echo: Any = None
    suffix: Any = None

    _unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {"best_of": (1,), "echo": (), "suffix": ()}

    def prompts(self) -> list[str] | list[list[int]]:
        """Each a text or token ids. Raises ApiError if there is none, or an empty one."""
        prompt: Any = self.prompt
        one = isinstance(prompt, str) or (prompt and isinstance(prompt[0], int))
        many: list[Any] = [prompt] if one else prompt
        if not many or not all(many):
            raise bad_request("'prompt' is empty; give at least one token.", "prompt", "invalid_value")
        return many


class Part(_Fields):
    type: str
    text: str | None = None
    refusal: Any = None
    image_url: Any = None
    input_audio: Any = None
    file: Any = None
    prompt_cache_breakpoint: Any = None


class ChatMessage(_Fields):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    name: str | None = None
    refusal: Any = None
    audio: Any = None
    tool_calls: Any = None
    function_call: Any = None
    tool_call_id: Any = None

    def text(self, where: str) -> str:
        """The content as one text. Raises ApiError for images, sounds and tools."""
        if self.role in ("tool", "function") or self.tool_calls or self.function_call or self.tool_call_id:
            raise bad_request(f"'{where}': tools are not supported by this server.", where, "unsupported_value")
        if self.audio or self.refusal:
            raise bad_request(f"'{where}': only text is supported by this server.", where, "unsupported_value")
        if isinstance(self.content, str):
            return self.content
        for i, part in enumerate(self.content or ()):
            if part.type != "text" or part.text is None:
                raise bad_request(
                    f"'{where}.content[{i}]': only parts of type text are supported by this server.",
                    f"{where}.content[{i}]",
                    "unsupported_value",
                )
        if not self.content:
            raise bad_request(f"Missing required parameter: '{where}.content'.", f"{where}.content", "invalid_value")
        return "".join(part.text or "" for part in self.content)


class ChatRequest(Generation):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    # Of no effect on the answer.
    metadata: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    # Refused, unless they ask for nothing.
    audio: Any = None
    function_call: Any = None
    functions: Any = None
    modalities: Any = None
    moderation: Any = None
    parallel_tool_calls: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    response_format: Any = None
    service_tier: Any = None
    store: Any = None
    tool_choice: Any = None
    tools: Any = None
    verbosity: Any = None
    web_search_options: Any = None

    _unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "audio": (),
        "function_call": ("none",),
        "functions": (),
        "modalities": (["text"],),
        "moderation": (),
        "parallel_tool_calls": (True,),
        "prediction": (),
        "reasoning_effort": ("none",),
        "response_format": ({"type": "text"},),
        "service_tier": ("auto", "default"),
        "store": (),
        "tool_choice": ("none", "auto"),
        "tools": (),
        "verbosity": ("medium",),
        "web_search_options": (),
    }

    def check(self) -> None:
        super().check()
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise bad_request(
                "Give 'max_completion_tokens' or the older 'max_tokens', not both.", "max_tokens", "invalid_value"
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise bad_request("'top_logprobs' is only allowed when 'logprobs' is true.", "top_logprobs")


_Body = TypeVar("_Body", bound=Generation)
_CODES = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter", "type": "invalid_type"}
_EITHER = {
    "prompt": "a string, a list of strings, a list of token ids or a list of lists of token ids",
    "stop": f"a string or up to {MAX_STOPS} strings",
}


def parse(kind: type[_Body], body: bytes) -> _Body:
    """The body as a request of ``kind``. Raises ApiError naming the first field that is wrong."""
    try:
        parsed = kind.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error) from error
    parsed.check()
    return parsed


def _refusal(error: ValidationError) -> ApiError:
    errors = error.errors(include_url=False, include_context=False)
    field = errors[0]["loc"][:1]
    # Where several kinds of values are allowed there is an error for each; the deepest is of the kind that was meant.
    worst = max((e for e in errors if e["loc"][:1] == field), key=lambda e: len(e["loc"]))
    kind, place = worst["type"], _place(worst["loc"], worst["type"])
    if kind == "json_invalid":
        return bad_request(f"We could not parse the JSON body of your request: {worst['msg']}.", code="invalid_json")
    if not place:
        return bad_request("The JSON body of your request must be an object.", code="invalid_json")
    if str(field[0]) in _EITHER and kind not in _CODES:
        return bad_request(
            f"Invalid type for '{field[0]}': give {_EITHER[str(field[0])]}.", str(field[0]), _CODES["type"]
        )
    if kind == "missing":
        message = f"Missing required parameter: '{place}'."
    elif kind == "extra_forbidden":
        message = f"Unrecognized request argument supplied: {place}"
    else:
        message = f"Invalid value for '{place}': {worst['msg'][:1].lower()}{worst['msg'][1:]}."
    code = _CODES.get(kind, _CODES["type"] if "type" in kind else "invalid_value")
    return bad_request(message, place, code)


def _place(loc: tuple[int | str, ...], kind: str) -> str:
    """``messages[0].content``. pydantic also names the kinds it tried, as ``list[str]``; they are left out."""
    place = ""
    for i, part in enumerate(loc):
        named = kind == "extra_forbidden" and i == len(loc) - 1  # the client's word, whatever it is
        if isinstance(part, int):
            place += f"[{part}]"
        elif named or not (part == "str" or "[" in part):
            place += f".{part}" if place else part
    return place


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
