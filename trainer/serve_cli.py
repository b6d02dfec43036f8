"""`planaria serve` and `planaria chat`. Nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from trainer.runtime_cli import add_runtime_options, runtime

KEY_VARIABLE = "PLANARIA_API_KEY"


def add_serve_verbs(
    verb: Callable[[str, Any, str], argparse.ArgumentParser],
    count: Callable[[str], int],
    fraction: Callable[[str], float],
) -> None:
    """``verb(name, run, text)`` makes a sub-command's parser; the others read a number above 0, and one up to 1."""
    serve = verb("serve", _serve, "serve a model over the OpenAI API")
    chat = verb("chat", _chat, "talk with a model in the terminal")
    for parser in (serve, chat):
        add_runtime_options(parser, count, fraction)
        parser.add_argument("--chat-template", metavar="FILE", help="Jinja; default: the tokenizer's own")

    serve.add_argument("--host", default="127.0.0.1", help="address to listen on; default: this machine only")
    serve.add_argument("--port", type=_port, default=8000, metavar="N", help="0: any that is free; it is printed")
    serve.add_argument("--api-key", metavar="KEY", help=f"what clients must send; default: ${KEY_VARIABLE}, or nothing")
    serve.add_argument("--model-name", metavar="NAME", help="what clients call it; default: the folder's name")
    serve.add_argument(
        "--adapter", type=_named, action="append", default=[], metavar="NAME=DIR", help="also serve MODEL:NAME"
    )
    serve.add_argument("--max-running", type=count, default=64, metavar="N", help="answers computed at once")
    serve.add_argument("--max-queue", type=count, default=256, metavar="N", help="answers that may wait; then 429")
    serve.add_argument("--max-tokens", type=count, default=4096, metavar="N", help="the most that one answer may have")
    serve.add_argument("--max-body", type=count, default=4 * 2**20, metavar="BYTES", help="of one request")
    serve.add_argument(
        "--drain-seconds", type=_seconds, default=30.0, metavar="S", help="for open answers, when told to end"
    )
    serve.add_argument(
        "--step-seconds", type=_seconds, default=300.0, metavar="S", help="a step that takes longer hangs; 0: never"
    )
    serve.add_argument(
        "--exit-when-hung", action="store_true", help="end with status 1 then, for whoever starts the server again"
    )
    serve.add_argument("--log-requests", action="store_true", help="a line for each on stderr, without the texts")

    chat.add_argument("--adapter", metavar="DIR", help="adapter folder")
    chat.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    chat.add_argument("--temperature", type=float, default=0.7, metavar="T", help="0: always the most probable token")
    chat.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from tokens of this probability")
    chat.add_argument("--seed", type=int, metavar="N", help="of the draws; default: another one each time")
    chat.add_argument("--max-new-tokens", type=count, default=1024, metavar="N", help="of one answer")


def _serve(arguments: argparse.Namespace) -> int:
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"planaria serve needs {' and '.join(missing)}, not installed here: pip install fastapi uvicorn, which is "
            "the extra 'serve'",
            file=sys.stderr,
        )
        return 2
    key = os.environ.get(KEY_VARIABLE) if arguments.api_key is None else arguments.api_key
    if key is not None and not re.fullmatch(r"[!-~]+", key):
        # An empty one most of all: whoever set it does not expect an open server.
        print(f"--api-key or ${KEY_VARIABLE}: a key is visible ASCII characters without spaces", file=sys.stderr)
        return 2
    from inference.server.serve import ServeOptions, serve

    return serve(
        ServeOptions(
            model_dir=arguments.model_dir,
            host=arguments.host,
            port=arguments.port,
            api_key=key,
            model_name=arguments.model_name,
            runtime=runtime(arguments),
            adapters=tuple(arguments.adapter),
            chat_template=arguments.chat_template,
            max_running=arguments.max_running,
            max_queue=arguments.max_queue,
            max_new_tokens=arguments.max_tokens,
            max_body=arguments.max_body,
            drain_s=arguments.drain_seconds,
            step_s=arguments.step_seconds,
            exit_when_hung=arguments.exit_when_hung,
            log_requests=arguments.log_requests,
        )
    )


def _chat(arguments: argparse.Namespace) -> int:
    from inference.chat import ChatOptions, chat

    names = ChatOptions.__dataclass_fields__.keys() - {"runtime"}
    return chat(ChatOptions(runtime=runtime(arguments), **{name: getattr(arguments, name) for name in names}))


def _port(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) < 65536):
        raise argparse.ArgumentTypeError(f"{text!r} is no port; give 0 to 65535")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds from 0 to 86400")
    return value


def _named(text: str) -> tuple[str, str]:
    name, separator, folder = text.partition("=")
    if not (separator and name and folder) or ":" in name or "/" in name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR, with a name without ':' and '/'")
    return name, folder
