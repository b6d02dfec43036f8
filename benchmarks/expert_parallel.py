"""What it costs to spread experts over two workers: bytes, times, and throughput against a worker that has them all.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.expert_parallel --config cpu
    torchrun --standalone --nproc-per-node 2 -m benchmarks.expert_parallel --config qwen3

Equal tokens on every worker in all arms, forward and backward. Arms take turns, and all workers begin each turn
together; the slowest worker's time counts, and the median over turns. Two lines tell of throughput, and the bar is for
both: one layer alone, which begins with nothing queued, so that the host's first launches count; and a layer among
several in a row, each added to its input, as in a running model. Bytes are counted where they are handed to the
exchange, those to other workers only. The limits (link, matrix product) are measured in the same run.

Prints tables and writes JSON to --json, or expert-parallel-CONFIG.json in the folder that the variable OUT names (else
build/).

Shapes: T tokens of a worker, K experts per token, E experts, L of them on a worker, H hidden, I intermediate.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import moe.exchange
from benchmarks.machine import describe_machine, result_path, save, say
from moe.dispatch import EXCHANGES, AllToAll, Routed
from moe.exchange import arrive, come_back, send, send_back
from moe.experts import Experts
from trainer.determinism import make_deterministic
from trainer.rendezvous import Process, die_with_launcher, join

# NCCL's multicast needs rights that containers often lack; it must be off before NCCL starts.
_ENVIRONMENT = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
_BARS = {"fewer_bytes": 3.5, "throughput": 0.9}  # on two GPUs at k=8


@dataclass(frozen=True)
class Config:
    """Sizes of one layer, and how many stand in a row; ``link`` and ``square`` are sizes of the limits: bytes to one
    worker, and a matrix's side."""

    device: str
    dtype: torch.dtype
    tokens: int
    hidden: int
    inner: int
    experts: int
    top_k: int
    layers: int
    rounds: int
    link: int
    square: int


CONFIGS = {
    "cpu": Config("cpu", torch.float32, 512, 256, 96, 16, 8, 4, 9, 4 << 20, 1024),
    "qwen3": Config("cuda", torch.bfloat16, 16384, 2048, 768, 128, 8, 4, 15, 256 << 20, 8192),
}


@dataclass(frozen=True)
class Arm:
    """``dispatch`` is None where every worker has all experts; ``in_a_row``: whether several layers are run, too."""

    name: str
    dispatch: str | None
    in_a_row: bool


ARMS = (
    Arm("ep1", None, True),
    Arm("all_to_all", "all_to_all", False),
    Arm("deduplicated", "deduplicated", True),
)


class Bench:
    """The layer in all its arms, the tokens, and the clock that all workers share."""

    def __init__(self, config: Config, process: Process, skew: float) -> None:
        self.config, self.process = config, process
        self.experts = {
            arm.name: [self._experts(arm, layer) for layer in range(config.layers if arm.in_a_row else 1)]
            for arm in ARMS
        }
        generator = torch.Generator().manual_seed(100 + process.rank)
        shape = (config.tokens, config.hidden)
        self.x_TH = torch.randn(shape, generator=generator).to(process.device, config.dtype).requires_grad_()
        self.d_out_TH = torch.randn(shape, generator=generator).to(process.device, config.dtype)
        self.index_TK = routing(config, skew, generator).to(process.device)
        weights_TK = torch.rand(config.tokens, config.top_k, generator=generator)
        self.weights_TK = weights_TK.to(process.device, config.dtype).requires_grad_()
        others = [routing(config, skew, generator).to(process.device) for _ in range(config.layers - 1)]
        self.index_of_layers = [self.index_TK, *others]

    def _experts(self, arm: Arm, layer: int) -> Experts:
        config, process = self.config, self.process
        local = config.experts if arm.dispatch is None else config.experts // process.world
        generator = torch.Generator(process.device).manual_seed(process.rank)

        def draw(*shape: int) -> nn.Parameter:
            weight = torch.randn(shape, generator=generator, device=process.device, dtype=config.dtype)
            return nn.Parameter(weight / shape[-1] ** 0.5)

        experts = Experts(
            draw(local, 2 * config.inner, config.hidden),
            draw(local, config.hidden, config.inner),
            layer=layer,
            num_experts=config.experts,
        )
        experts.ep_group = dist.group.WORLD
        experts.dispatch = arm.dispatch or "auto"
        return experts

    def step(self, arm: str, layers: int = 1) -> None:
        """Forward and backward of one layer, or of several in a row; gradients of everything."""
        used = self.experts[arm][:layers]
        for tensor in (self.x_TH, self.weights_TK, *(p for experts in used for p in experts.parameters())):
            tensor.grad = None
        x_TH: Tensor = self.x_TH
        for experts, index_TK in zip(used, self.index_of_layers, strict=False):
            out_TH = experts(x_TH, index_TK, self.weights_TK)
            x_TH = out_TH if layers == 1 else x_TH + out_TH
        x_TH.backward(self.d_out_TH)

    def seconds(self, work: Callable[[], object]) -> float:
        """Of the slowest worker; all begin together."""
        dist.barrier()
        self._wait()
        started = time.perf_counter()
        work()
        self._wait()
        taken = torch.tensor(time.perf_counter() - started, dtype=torch.float64, device=self.process.device)
        dist.all_reduce(taken, dist.ReduceOp.MAX)
        return float(taken)

    def _wait(self) -> None:
        if self.process.device.type == "cuda":
            torch.cuda.synchronize()

    def median(self, work: Callable[[], object]) -> float:
        self.seconds(work)
        return statistics.median(self.seconds(work) for _ in range(self.config.rounds))


def routing(config: Config, skew: float, generator: torch.Generator) -> Tensor:
    """K different experts for every token, [T,K]; popularity falls as 1/rank^skew, the same experts' on all workers."""
    order_E = torch.randperm(config.experts, generator=torch.Generator().manual_seed(1))
    popularity_E = (order_E + 1.0) ** -skew
    return torch.multinomial(popularity_E.expand(config.tokens, -1), config.top_k, generator=generator)


@contextmanager
def counted(rank: int) -> Iterator[dict[str, int]]:
    """Bytes handed to the exchange for other workers while it is open."""
    found = {"bytes": 0}
    original = moe.exchange.all_to_all

    def count(out: Tensor, x: Tensor, received: Any, sent: Any, group: Any) -> dist.Work:
        found["bytes"] += sum(n for other, n in enumerate(sent) if other != rank) * x.shape[1] * x.element_size()
        return original(out, x, received, sent, group)

    moe.exchange.all_to_all = count
    try:
        yield found
    finally:
        moe.exchange.all_to_all = original


def count_bytes(bench: Bench, arm: str) -> dict[str, dict[str, int]]:
    """Over all workers, of the forward and of the backward pass."""
    out: dict[str, dict[str, int]] = {}
    experts = bench.experts[arm][0]
    with counted(bench.process.rank) as forward:
        result = experts(bench.x_TH, bench.index_TK, bench.weights_TK)
    with counted(bench.process.rank) as backward:
        result.backward(bench.d_out_TH)
    for name, found in (("forward", forward), ("backward", backward)):
        total = torch.tensor(list(found.values()), device=bench.process.device)
        dist.all_reduce(total)
        out[name] = dict(zip(found, total.tolist(), strict=True))
    return out


def time_directions(bench: Bench, method: str) -> dict[str, float]:
    """Sending and returning alone, without the experts; and everything before that, the exchange of counts included."""
    group = dist.group.WORLD
    assert group is not None
    dispatcher: AllToAll = EXCHANGES[method](bench.config.experts, group)
    routed = Routed(bench.x_TH.detach(), bench.index_TK, bench.weights_TK.detach())
    flight = dispatcher.dispatch_preprocess(routed).flight
    assert flight is not None
    weights_QC = routed.weights_TK.reshape(flight.route.weights_shape)
    y_RH = arrive(flight, *send(flight, routed.x_TH, weights_QC)[:2])[0].clone()
    return {
        "plan_s": bench.median(lambda: dispatcher.dispatch_preprocess(routed)),
        "send_s": bench.median(lambda: arrive(flight, *send(flight, routed.x_TH, weights_QC)[:2])),
        "return_s": bench.median(lambda: come_back(flight, send_back(flight, y_RH))),
    }


def measure_limits(bench: Bench) -> dict[str, float]:
    """The link's bandwidth a direction, the exchange of counts with its wait alone, and a matrix product's speed."""
    config, device, world = bench.config, bench.process.device, bench.process.world
    x = torch.randint(0, 255, (world * config.link,), dtype=torch.uint8, device=device)
    out = torch.empty_like(x)
    mine = bench.process.rank
    splits = [0 if rank == mine else config.link for rank in range(world)]
    payload = x[: sum(splits)]
    target = out[: sum(splits)]
    link_s = bench.median(lambda: dist.all_to_all_single(target, payload, splits, splits))
    counts, answer = torch.ones(2, world, 2, dtype=torch.int32, device=device)
    a = torch.randn(config.square, config.square, device=device).to(config.dtype)
    product = torch.empty_like(a)
    matmul_s = bench.median(lambda: torch.mm(a, a, out=product))
    return {
        "link_gbps": sum(splits) / link_s / 1e9,
        "counts_s": bench.median(lambda: (dist.all_to_all_single(answer, counts), answer.tolist())),
        "matmul_tflops": 2 * config.square**3 / matmul_s / 1e12,
    }


def measure(bench: Bench) -> dict[str, Any]:
    """All arms in turns, one layer and then several, then the exchanges alone."""
    return {
        "seconds": in_turns(bench, [arm.name for arm in ARMS], 1),
        "seconds_in_a_row": in_turns(bench, [arm.name for arm in ARMS if arm.in_a_row], bench.config.layers),
        "bytes": {method: count_bytes(bench, method) for method in EXCHANGES},
        "alone": {method: time_directions(bench, method) for method in EXCHANGES},
        "limits": measure_limits(bench),
    }


def in_turns(bench: Bench, arms: list[str], layers: int) -> dict[str, list[float]]:
    """Seconds a layer."""
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    for turn in range(-2, bench.config.rounds):
        for arm in arms:
            taken = bench.seconds(lambda arm=arm: bench.step(arm, layers))
            if turn >= 0:
                times[arm].append(taken / layers)
    return times


def summarise(config: Config, found: dict[str, Any]) -> dict[str, Any]:
    """Ratios: bytes of all exchanges, plain over deduplicated; throughput of each arm over ``ep1``, turn by turn."""
    total = {
        method: sum(direction["bytes"] for direction in directions.values())
        for method, directions in found["bytes"].items()
    }
    flops = 18 * config.tokens * config.top_k * config.hidden * config.inner

    def of_arms(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
        middles = {arm: statistics.median(seconds) for arm, seconds in times.items()}
        return {
            arm: {
                "step_s": middles[arm],
                "throughput": statistics.median(a / b for a, b in zip(times["ep1"], seconds, strict=True)),
                "tokens_per_s": config.tokens / middles[arm],
                "of_matmul": flops / middles[arm] / 1e12 / found["limits"]["matmul_tflops"],
            }
            for arm, seconds in times.items()
        }

    return {
        "bytes_per_step": total,
        "fewer_bytes": total["all_to_all"] / total["deduplicated"],
        "arms": of_arms(found["seconds"]),
        "arms_in_a_row": of_arms(found["seconds_in_a_row"]),
    }


def table(name: str, found: dict[str, Any], summary: dict[str, Any], world: int, layers: int) -> str:
    limits = found["limits"]
    lines = [
        "",
        f"{name} routing, {world} workers; link {limits['link_gbps']:.2f} GB/s a direction, matrix product "
        f"{limits['matmul_tflops']:.3f} TFLOP/s, counts alone {1e3 * limits['counts_s']:.3f} ms",
        "arm                     fwd+bwd ms   tokens/s a worker   x ep1   of the matrix product",
    ]
    for title, arms in (("one layer alone", "arms"), (f"a layer among {layers} in a row", "arms_in_a_row")):
        lines.append(f"{title}:")
        lines += [
            f"{arm:22s} {1e3 * row['step_s']:11.2f} {row['tokens_per_s']:19,.0f} {row['throughput']:7.3f} "
            f"{row['of_matmul']:23.1%}"
            for arm, row in summary[arms].items()
        ]
    lines.append("exchange alone          plan ms   send ms   return ms   MB a step   sending, of the link")
    for method, times in found["alone"].items():
        gbps = found["bytes"][method]["forward"]["bytes"] / 2 / world / times["send_s"] / 1e9
        lines.append(
            f"{method:22s} {1e3 * times['plan_s']:8.3f} {1e3 * times['send_s']:9.3f} {1e3 * times['return_s']:11.3f} "
            f"{summary['bytes_per_step'][method] / 1e6:11.2f} {gbps / limits['link_gbps']:22.1%}"
        )
    lines.append(f"fewer bytes: {summary['fewer_bytes']:.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", choices=sorted(CONFIGS), required=True)
    parser.add_argument("--rounds", type=int, help="turns of every arm, instead of the config's")
    parser.add_argument("--json", help="where to write the figures")
    options = parser.parse_args()
    os.environ.update({name: os.environ.get(name, value) for name, value in _ENVIRONMENT.items()})
    die_with_launcher()
    config = CONFIGS[options.config]
    if options.rounds:
        config = dataclasses.replace(config, rounds=options.rounds)
    process = join(config.device)
    make_deterministic(process.device)
    if process.world < 2:
        sys.exit("give torchrun --nproc-per-node 2: with one worker no token travels")
    result: dict[str, Any] = {
        "machine": describe_machine(),
        "config": dataclasses.asdict(config),
        "world": process.world,
        "bars": _BARS if config.device == "cuda" else {},
        "routings": {},
    }
    path = result_path(f"expert-parallel-{options.config}.json", options.json)
    for name, skew in (("balanced", 0.0), ("skewed (Zipf)", 1.0)):
        bench = Bench(config, process, skew)
        found = measure(bench)
        summary = summarise(config, found)
        result["routings"][name] = {**found, "summary": summary}
        result["backend"] = dataclasses.asdict(bench.experts["deduplicated"][0].backend)
        if process.rank == 0:
            save(path, result)
            say(table(name, found, summary, process.world, config.layers))
        del bench
    if process.rank == 0:
        say(f"experts run as {result['backend']['name']}; written to {path}")
        say(f"bars on two GPUs with balanced routing, throughput for one layer and for several: {_BARS}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
