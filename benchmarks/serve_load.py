"""Whether the server holds many clients, of whom some vanish: ``python -m benchmarks.serve_load --seconds 120``.

Starts ``planaria serve`` on a tiny model made here (or on ``--model DIR``) and asks it through openai's client: plain
and chat completions, streamed and whole, of random lengths. A share of the requests is given up midway by closing the
connection. Prints errors, tokens/s, percentiles of the time to the first token, and the server's memory; exit status 1
if a request failed, an answer was left over, the server did not end well, or its memory grew from the middle to the end
by more than a tenth.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI

ROOT = Path(__file__).parents[1]
WORDS = ("a", "planarian", "regrows", "whole", "from", "any", "fragment", "and", "so", "should", "every", "run")
GROWTH = 1.1
_SETTLED = 0.1  # the part of the run after which memory is first looked at


@dataclass
class Tally:
    """What the clients saw."""

    whole: int = 0
    vanished: int = 0
    tokens: int = 0
    first_s: list[float] = field(default_factory=list)
    between_s: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)


async def client(number: int, port: int, arguments: argparse.Namespace, tally: Tally, end: float) -> None:
    """Asks again and again until ``end``, with a connection pool of its own."""
    draw = random.Random(number)
    async with AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60) as openai:
        while time.monotonic() < end:
            vanishes = draw.random() < arguments.vanish
            try:
                await _ask(openai, draw, arguments, tally, vanishes)
            except Exception as error:
                tally.errors[f"{type(error).__name__}: {error}"[:120]] += 1


async def _ask(openai: AsyncOpenAI, draw: random.Random, arguments: Any, tally: Tally, vanishes: bool) -> None:
    chat, stream = draw.random() < 0.5, draw.random() < 0.75
    text = " ".join(draw.choices(WORDS, k=draw.randint(1, 30)))
    new = draw.randint(4, arguments.max_tokens)
    asked: dict[str, Any] = {"model": arguments.name, "seed": draw.randrange(1000), "stream": stream}
    asked["extra_body"] = {"ignore_eos": True}
    create: Any = openai.chat.completions.create if chat else openai.completions.create
    asked |= (
        {"messages": [{"role": "user", "content": text}], "max_completion_tokens": new}
        if chat
        else {"prompt": text, "max_tokens": new}
    )
    if stream:
        await _read(await _timed(create(**asked), tally), new, draw.randint(0, new // 2) if vanishes else None, tally)
    elif vanishes:
        try:
            await asyncio.wait_for(create(**asked), draw.uniform(0.01, 0.3))
        except TimeoutError:
            tally.vanished += 1
    else:
        answer = await create(**asked)
        if answer.usage.completion_tokens != new:
            raise AssertionError(f"{answer.usage.completion_tokens} tokens instead of {new}")
        tally.whole += 1
        tally.tokens += new


async def _timed(opening: Any, tally: Tally) -> Any:
    """The stream, whose headers come with its first token."""
    began = time.perf_counter()
    stream = await opening
    tally.first_s.append(time.perf_counter() - began)
    return stream


async def _read(stream: Any, new: int, vanish_after: int | None, tally: Tally) -> None:
    pieces, finish, before = 0, None, time.perf_counter()
    async for piece in stream:
        choice = piece.choices[0]
        finish = choice.finish_reason or finish
        pieces += 1
        if pieces > 2:
            tally.between_s.append(time.perf_counter() - before)
        before = time.perf_counter()
        if vanish_after is not None and pieces > vanish_after:
            await stream.close()
            tally.vanished += 1
            return
    if finish != "length":
        raise AssertionError(f"a stream ended with {finish} after {pieces} pieces")
    tally.whole += 1
    tally.tokens += new


def metrics(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    samples = [line.rpartition(" ") for line in lines if not line.startswith("#")]
    return {name: float(value) for name, _, value in samples}


async def load(port: int, arguments: argparse.Namespace, tally: Tally) -> list[tuple[float, float]]:
    """Runs all clients. Returns (seconds, resident bytes of the server), read every second."""
    began = time.monotonic()
    end = began + arguments.seconds
    clients = [asyncio.create_task(client(i, port, arguments, tally, end)) for i in range(arguments.clients)]
    memory = []
    while time.monotonic() < end:
        await asyncio.sleep(1)
        now = await asyncio.to_thread(metrics, port)
        memory.append((time.monotonic() - began, now["process_resident_memory_bytes"]))
    await asyncio.gather(*clients)
    return memory


@contextmanager
def server(folder: str, budget: float) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    command = [sys.executable, "-m", "trainer", "serve", folder, "--port", "0", "--expert-budget", str(budget)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        ready = process.stdout.readline()
        found = re.match(r"ready: http://127\.0\.0\.1:(\d+)/v1", ready)
        if not found:
            sys.exit(f"the server did not start: {ready}")
        yield int(found[1]), process
    finally:
        process.kill()
        process.wait()


def tiny_model(folder: Path) -> None:
    """A Qwen3-MoE with random weights over bytes: 4 layers of 16 experts, 4 for a token, H=64, I=32."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from trainer.tokenizer import byte_tokenizer, save_tokenizer

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        moe_intermediate_size=32,
        num_experts=16,
        num_experts_per_tok=4,
        vocab_size=257,
        norm_topk_prob=True,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    save_tokenizer(byte_tokenizer(), folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")


def percentiles(values: list[float]) -> str:
    if len(values) < 2:
        return "too few"
    cuts = statistics.quantiles(values, n=100)
    return f"p50 {cuts[49] * 1e3:.0f} ms, p95 {cuts[94] * 1e3:.0f} ms, p99 {cuts[98] * 1e3:.0f} ms"


def judge(tally: Tally, memory: list[tuple[float, float]], after: dict[str, float], status: int) -> list[str]:
    """What is wrong, in words; empty if nothing is."""
    wrong = [f"{count} times {error}" for error, count in tally.errors.most_common()]
    left = after["planaria_answers_running"] + after["planaria_answers_waiting"] + after["planaria_kv_blocks_used"]
    if left:
        wrong.append(f"{left:g} answers or blocks are left over")
    if status != 0:
        wrong.append(f"the server ended with status {status}")
    middle, end = memory[len(memory) // 2][1], memory[-1][1]
    if end > GROWTH * middle:
        wrong.append(f"memory grew from {middle / 1e6:.0f} to {end / 1e6:.0f} MB in the second half")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="DIR", help="default: a tiny model with random weights")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--vanish", type=float, default=0.1, help="share of the requests that are given up midway")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--expert-budget", type=float, default=0.25)
    parser.add_argument("--json", metavar="FILE", help="write the figures here, too")
    arguments = parser.parse_args()
    tally = Tally()
    with tempfile.TemporaryDirectory() as made:
        folder = arguments.model or f"{made}/tiny"
        if arguments.model is None:
            tiny_model(Path(folder))
        arguments.name = Path(folder).resolve().name
        with server(folder, arguments.expert_budget) as (port, process):
            memory = asyncio.run(load(port, arguments, tally))
            # What vanished last is cancelled in the engine's next step.
            deadline = time.monotonic() + 30
            after = metrics(port)
            while after["planaria_kv_blocks_used"] and time.monotonic() < deadline:
                after = metrics(port)
            process.send_signal(signal.SIGTERM)
            status = process.wait(timeout=60)
    settled = [sample for sample in memory if sample[0] >= _SETTLED * arguments.seconds] or memory
    kept = {"start": settled[0], "middle": memory[len(memory) // 2], "end": memory[-1]}
    seconds = memory[-1][0]
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {arguments.clients} clients")
    print(
        f"{seconds:.0f} s: {tally.whole} answers, {tally.vanished} given up midway (the server counts "
        f"{after['planaria_cancelled_total']:g}), {sum(tally.errors.values())} errors"
    )
    made_tokens = after["planaria_new_tokens_total"]
    print(f"{made_tokens / seconds:.0f} tokens/s, {(tally.whole + tally.vanished) / seconds:.1f} requests/s")
    print(f"first token: {percentiles(tally.first_s)}; between pieces: {percentiles(tally.between_s)}")
    print("resident: " + ", ".join(f"{m / 1e6:.0f} MB at {s:.0f} s ({n})" for n, (s, m) in kept.items()))
    wrong = judge(tally, memory, after, status)
    print("\n".join(wrong) or "ok: no error, nothing left over, memory flat")
    if arguments.json:
        figures = {"seconds": seconds, "tokens": made_tokens, "memory": memory, "wrong": wrong}
        Path(arguments.json).write_text(json.dumps(figures))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
