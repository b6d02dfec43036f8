"""Decoding on a CPU: our runtime, all experts resident, beside transformers with each way it has to compute experts.

All arms have the same weights and prompts and take turns, so that other load meets all alike. Only decoding is timed:
the clock starts when every sequence has its first new token.

``python -m benchmarks.cpu_decode [--shape quickstart|small] [--threads 2]`` says by how much ours is faster than
transformers' fastest at one sequence, and what 16 sequences gain on one.

Shapes: B sequences, S tokens of each.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from benchmarks.machine import describe_machine, result_path, save, say
from inference.engine import LLM
from inference.requests import Request

PROMPT = 32
WAYS = ("eager", "batched_mm", "grouped_mm")
BATCH = 16
SHAPES: dict[str, dict[str, Any]] = {
    "quickstart": {
        "hidden_size": 192, "moe_intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 32, "num_experts": 32, "num_experts_per_tok": 4, "vocab_size": 2048,
    },
    "small": {
        "hidden_size": 384, "moe_intermediate_size": 192, "num_hidden_layers": 6, "num_attention_heads": 12,
        "num_key_value_heads": 4, "head_dim": 32, "num_experts": 32, "num_experts_per_tok": 4, "vocab_size": 8192,
    },
}  # fmt: skip

Round = Callable[[int, int], float]  # (sequences, tokens) -> seconds


def write_model(folder: Path, shape: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3_moe", **SHAPES[shape], max_position_embeddings=2048, norm_topk_prob=True)
    config.eos_token_id = config.bos_token_id = None
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def prompts(sequences: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, 2000, (sequences, PROMPT), generator=generator).tolist()


def ours(llm: LLM) -> Round:
    def run(sequences: int, tokens: int) -> float:
        for number, prompt in enumerate(prompts(sequences)):
            llm.engine.submit(Request(str(number), tuple(prompt), max_new_tokens=tokens + 1))
        begun: set[str] = set()
        while len(begun) < sequences:
            begun |= {output.id for output in llm.engine.step()}
        started = time.perf_counter()
        while llm.engine.has_work():
            llm.engine.step()
        return time.perf_counter() - started

    return run


def theirs(model: torch.nn.Module) -> Round:
    """A loop around the model, which costs less than ``generate``."""

    @torch.inference_mode()
    def run(sequences: int, tokens: int) -> float:
        kv, fed_BS = DynamicCache(config=model.config), torch.tensor(prompts(sequences))
        for made in range(tokens + 1):
            if made == 1:
                started = time.perf_counter()
            out = model(input_ids=fed_BS, past_key_values=kv, use_cache=True, logits_to_keep=1)
            fed_BS = out.logits[:, -1].argmax(-1, keepdim=True)
        return time.perf_counter() - started

    return run


def measure(folder: Path, tokens: int, rounds: int) -> dict[str, list[float]]:
    """Tokens per second of each arm in each round."""
    arms: dict[str, tuple[Round, int]] = {"ours": (ours(LLM(folder, device="cpu")), 1)}
    arms[f"ours, {BATCH} sequences"] = (arms["ours"][0], BATCH)
    for way in WAYS:
        model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation=way, dtype=torch.float32).eval()
        arms[f"transformers, {way}"] = (theirs(model), 1)
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name, (run, sequences) in arms.items():
            seconds = run(sequences, tokens)
            if turn:  # the first is for caches to fill
                rates[name].append(sequences * tokens / seconds)
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="quickstart")
    parser.add_argument("--threads", type=int, default=min(2, len(os.sched_getaffinity(0))))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", help="file for the JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), arguments.shape)
        rates = measure(Path(folder), arguments.tokens, arguments.rounds)
    say(f"{arguments.shape}, fp32, {arguments.threads} threads; tokens/s, median and best of {arguments.rounds} rounds")
    medians = {name: statistics.median(found) for name, found in rates.items()}
    for name, found in rates.items():
        say(f"  {name:<26} {medians[name]:8.1f} {max(found):8.1f}")
    best = max((name for name in rates if name.startswith("transformers")), key=medians.__getitem__)
    single = [one / other for one, other in zip(rates["ours"], rates[best], strict=True)]
    many = [one / other for one, other in zip(rates[f"ours, {BATCH} sequences"], rates["ours"], strict=True)]
    say(f"one sequence: {statistics.median(single):.2f} x {best}")
    say(f"{BATCH} sequences: {statistics.median(many):.2f} x one")
    result = {"machine": describe_machine(), "arguments": vars(arguments), "tokens_per_s": rates}
    save(result_path("cpu-decode.json", arguments.out), result)


if __name__ == "__main__":
    main()
