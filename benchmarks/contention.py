"""What a capture does to the training thread beside it: copies to host memory, and checksums by another process.

    python -m benchmarks.contention --gib 2 --hashers 1 2 4 8

Three loops stand for a training thread that the device waits for: launches of a tiny kernel, small forward and backward
passes, plain Python. Each runs alone, beside copies by the copy engine in pieces of several sizes, and beside a process
that hashes with so many threads; in turn, and medians are compared with those of the loop alone. Without a GPU all
loops run on the CPU and a thread copies. Prints a table and writes JSON to --json, or contention.json in the folder
that OUT names.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.machine import GIB, describe_machine, result_path, save, say

_PIECES = (1 << 20, 4 << 20, 32 << 20)
_HASH = """
import sys, threading, xxhash
memory = memoryview(bytearray(int(sys.argv[2])))
def work():
    while True:
        for at in range(0, len(memory), 1 << 22):
            xxhash.xxh3_128_digest(memory[at : at + (1 << 22)])
for _ in range(int(sys.argv[1])):
    threading.Thread(target=work, daemon=True).start()
print("ready", flush=True)
sys.stdin.read()
"""


class Loops:
    """The training thread's stand-ins; each returns microseconds per turn."""

    def __init__(self, device: torch.device, turns: int) -> None:
        self.device, self.turns = device, turns
        self.small = [torch.zeros(1024, device=device) for _ in range(8)]
        self.linear = torch.nn.Linear(256, 256, device=device)
        self.x_BH = torch.randn(64, 256, device=device, requires_grad=True)
        self.table = dict.fromkeys(range(5000), 0)

    def __iter__(self) -> Iterator[tuple[str, Callable[[], float]]]:
        yield "launches", lambda: self._timed(self._launch, self.turns)
        yield "passes", lambda: self._timed(self._pass, self.turns // 20)
        yield "python", lambda: self._timed(self._python, self.turns * 20)

    def _timed(self, turn: Callable[[int], None], turns: int) -> float:
        started = time.perf_counter()
        for number in range(turns):
            turn(number)
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # not the side stream's copies
        return (time.perf_counter() - started) / turns * 1e6

    def _launch(self, number: int) -> None:
        self.small[number % 8].add_(1)

    def _pass(self, number: int) -> None:
        h_BH = torch.nn.functional.silu(self.linear(self.x_BH)) * self.x_BH
        h_BH.softmax(-1).sum().backward()
        self.linear.zero_grad(set_to_none=True)
        self.x_BH.grad = None

    def _python(self, number: int) -> None:
        self.table[number % 5000] = self.table[number * 7919 % 5000] + 1


class Copies:
    """Copies the source once, piece by piece, beside whoever started them."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self.source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=device)
        self.target = torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def beside(self, piece: int) -> Iterator[None]:
        pairs = list(zip(self.target.split(piece), self.source.split(piece), strict=True))
        if self.stream is not None:
            with torch.cuda.stream(self.stream):
                for target, source in pairs:
                    target.copy_(source, non_blocking=True)
            yield
            self.stream.synchronize()
            return
        thread = threading.Thread(target=lambda: [target.copy_(source) for target, source in pairs])
        thread.start()
        yield
        thread.join()


@contextmanager
def hashing(threads: int, nbytes: int) -> Iterator[None]:
    """Another process hashes as the keeper does; with 0 threads there is none."""
    if not threads:
        yield
        return
    command = [sys.executable, "-c", _HASH, str(threads), str(nbytes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield
        finally:
            process.kill()


def compare(loops: Loops, copies: Copies, rounds: int) -> dict[str, dict[str, float]]:
    """Medians of every loop, alone and beside copies of every size of pieces."""
    times: dict[str, dict[str, list[float]]] = {}
    for _ in range(rounds):
        for piece in (0, *_PIECES):
            arm = f"copies of {piece >> 20} MiB" if piece else "alone"
            for name, loop in loops:
                if piece:
                    with copies.beside(piece):
                        microseconds = loop()
                else:
                    microseconds = loop()
                times.setdefault(arm, {}).setdefault(name, []).append(microseconds)
    return {arm: {name: statistics.median(values) for name, values in row.items()} for arm, row in times.items()}


def table(title: str, found: dict[str, dict[str, float]], alone: dict[str, float]) -> str:
    lines = [title]
    for arm, row in found.items():
        shares = "  ".join(f"{n} {us:9.2f} us {100 * (us / alone[n] - 1):+6.1f} %" for n, us in row.items())
        lines.append(f"  {arm:18s} {shares}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=2, help="copied in one go, and hashed over and over")
    parser.add_argument("--hashers", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--turns", type=int, default=3000, help="launches in one measurement")
    parser.add_argument("--json", help="where to write the figures")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    nbytes = int(options.gib * GIB)
    loops, copies = Loops(device, options.turns), Copies(device, nbytes)
    compare(loops, copies, 1)  # warm
    path = result_path("contention.json", options.json)
    result: dict[str, Any] = {"machine": describe_machine(), "arguments": vars(options), "us": {}}
    for threads in (0, *options.hashers):
        with hashing(threads, nbytes):
            found = compare(loops, copies, options.rounds)
        result["us"][threads] = found
        alone = result["us"][0]["alone"]
        say(table(f"beside {threads} hashing threads, over nothing at all", found, alone))
        save(path, result)
    say(f"written to {path}")


if __name__ == "__main__":
    main()
