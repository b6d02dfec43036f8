"""Decoding requests of several adapters together: one pass for all of them, beside one pass for each.

Both arms are the same engine over the same weights and take turns, so that other load meets both alike. Each adapter
has as many sequences as every other one. Only decoding is timed: the clock starts when every sequence has its first new
token.

``python -m benchmarks.serve_adapters [--shape quickstart|small] [--kind attention|experts|both] [--adapters 2 4 8]``
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks.cpu_decode import SHAPES, prompts, write_model
from benchmarks.machine import describe_machine, result_path, save, say
from inference.engine import LLM
from inference.requests import Request
from lora.attach import attach
from lora.config import BankConfig
from lora.format import collect_adapter, save_adapter
from moe.convert import convert
from moe.fingerprint import fingerprint

ATTENTION = BankConfig("lora", ("q_proj", "k_proj", "v_proj", "o_proj"), r=8)
EXPERTS = BankConfig("expert-lora", ("gate_up_proj", "down_proj"), r=8)
KINDS = {
    "attention": {"attention": ATTENTION},
    "experts": {"experts": EXPERTS},
    "both": {"attention": ATTENTION, "experts": EXPERTS},
}


def write_adapters(folder: Path, model_folder: Path, kind: str, count: int) -> dict[str, Path]:
    """As many adapters of one kind as asked for, with random factors."""
    made, known = {}, fingerprint(model_folder)
    for number in range(count):
        model = AutoModelForCausalLM.from_pretrained(model_folder)
        attach(model, KINDS[kind], convert(model), seed=number)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(".B"):
                    parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
        made[f"adapter-{number}"] = folder / f"{kind}-{number}"
        save_adapter(made[f"adapter-{number}"], collect_adapter(model), KINDS[kind], known)
    return made


def decode(llm: LLM, names: list[str], each: int, tokens: int) -> float:
    """Seconds to decode ``each`` sequences of every adapter together."""
    for number, prompt in enumerate(prompts(each * len(names))):
        name = names[number % len(names)]
        llm.engine.submit(Request(str(number), tuple(prompt), max_new_tokens=tokens + 1, adapter=name))
    begun: set[str] = set()
    while len(begun) < each * len(names):
        begun |= {output.id for output in llm.engine.step()}
    started = time.perf_counter()
    while llm.engine.has_work():
        llm.engine.step()
    return time.perf_counter() - started


def measure(llm: LLM, names: list[str], each: int, tokens: int, rounds: int) -> dict[str, list[float]]:
    """Tokens per second of both arms in each round."""
    rates: dict[str, list[float]] = {"one pass": [], "a pass each": []}
    arms = {"one pass": llm.engine.joint, "a pass each": None}
    for turn in range(rounds + 1):
        for arm, llm.engine.joint in arms.items():
            seconds = decode(llm, names, each, tokens)
            if turn:  # the first is for caches to fill
                rates[arm].append(each * len(names) * tokens / seconds)
    llm.engine.joint = arms["one pass"]
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="quickstart")
    parser.add_argument("--kind", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument("--adapters", type=int, nargs="+", default=[2, 4, 8], metavar="N")
    parser.add_argument("--each", type=int, default=1, metavar="N", help="sequences of each adapter")
    parser.add_argument("--expert-budget", type=float, default=1.0, metavar="F")
    parser.add_argument("--threads", type=int, default=min(2, len(os.sched_getaffinity(0))))
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", help="file for the JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found: dict[str, dict[str, list[float]]] = {}
    say(f"{arguments.shape}, fp32, {arguments.threads} threads; tokens/s, median of {arguments.rounds} rounds")
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "model", arguments.shape)
        for kind in arguments.kind:
            folders = write_adapters(Path(folder), Path(folder) / "model", kind, max(arguments.adapters))
            with LLM(Path(folder) / "model", arguments.expert_budget, device="cpu", adapters=folders) as llm:
                for count in arguments.adapters:
                    rates = measure(llm, list(folders)[:count], arguments.each, arguments.tokens, arguments.rounds)
                    found[f"{kind}, {count}"] = rates
                    ratio = statistics.median(a / b for a, b in zip(*rates.values(), strict=True))
                    one, each = map(statistics.median, rates.values())
                    rated = f"{one:8.1f} in one pass, {each:8.1f} in a pass each"
                    say(f"  {kind:<10} {count:>2} adapters: {rated}: {ratio:.2f} x")
    result = {"machine": describe_machine(), "arguments": vars(arguments), "tokens_per_s": found}
    save(result_path("serve-adapters.json", arguments.out), result)


if __name__ == "__main__":
    main()
