"""Experts a second that the CPU lane computes, packed and as they are, from host memory; and what packing takes.

Both forms have the same experts and take turns, and the best of their rounds counts: others may use the cores. The
experts of a form are more than caches hold, and each call takes the next ones. Weights are normally distributed, as
those of trained models are: a few in ten thousand are exceptions.

``python -m benchmarks.cpu_lane [--threads 1 2] [--rows 1 2 8]``; rows go to each expert of a call.

Shapes: E experts, B elements of a block, N bytes of a packed one, T rows, P pairs, H hidden, I intermediate.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import describe_machine, result_path, save, say
from inference.banks import host_memory
from inference.cpu_lane import CpuLane, LaneCall
from inference.expert_block import ExpertBlock, ExpertShape
from inference.packed import PackedBlock
from inference.packing import pack_into, unpack_into

CHOICES = 8


class Experts:
    """The same experts in both forms."""

    def __init__(self, hidden: int, intermediate: int, count: int) -> None:
        self.layout = ExpertBlock(ExpertShape(count, hidden, intermediate), torch.bfloat16)
        elements, stride = self.layout.elements, PackedBlock(self.layout.elements).stride
        self.raw_EB = host_memory(count * elements, torch.bfloat16).view(count, elements)
        self.packed_EN = host_memory(count * stride, torch.uint8).view(count, stride)
        generator = torch.Generator().manual_seed(0)
        one_B = (torch.randn(elements, generator=generator) * 0.02).bfloat16()
        self.packed_EN.fill_(1)  # so that packing is not timed with the kernel's clearing of pages
        pack_s, unpack_s, back_B = [], [], torch.empty_like(one_B)
        for expert, block_B in enumerate(self.raw_EB):
            block_B.copy_(one_B.roll(expert))
            began = time.perf_counter()
            self.used = pack_into(block_B, self.packed_EN[expert])
            packed = time.perf_counter()
            unpack_into(self.packed_EN[expert], back_B)
            pack_s.append(packed - began)
            unpack_s.append(time.perf_counter() - packed)
            assert torch.equal(back_B.view(torch.int16), block_B.view(torch.int16))
        self.pack_rate, self.unpack_rate = (self.layout.nbytes / statistics.median(s) for s in (pack_s, unpack_s))

    def blocks(self, packed: bool) -> list[int]:
        bank: Tensor = self.packed_EN if packed else self.raw_EB
        return [block.data_ptr() for block in bank]


def lane_s(lane: CpuLane, experts: Experts, rows: int, rounds: int) -> dict[bool, float]:
    """Seconds an expert takes by form, the best of rounds through all; the bits of both are compared."""
    hidden = experts.layout.shape.hidden
    x_TH = torch.randn(rows, hidden, generator=torch.Generator().manual_seed(1)).numpy()
    score_TK = np.full((rows, CHOICES), 0.5, np.float32)
    y_PH = {packed: np.zeros((rows * CHOICES, hidden), np.float32) for packed in (False, True)}
    calls = {packed: LaneCall(x_TH, score_TK, y_PH[packed], CHOICES) for packed in (False, True)}
    first = [rows * choice for choice in range(CHOICES + 1)]
    pairs = [CHOICES * row + choice for choice in range(CHOICES) for row in range(rows)]
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(rounds):
        for packed, spent in times.items():
            blocks = experts.blocks(packed)
            began = time.perf_counter()
            for start in range(0, len(blocks) - CHOICES + 1, CHOICES):
                lane.submit(calls[packed], blocks[start : start + CHOICES], first, pairs, packed=packed)
            lane.wait()
            spent.append((time.perf_counter() - began) / (len(blocks) // CHOICES * CHOICES))
        assert np.array_equal(y_PH[False].view(np.int32), y_PH[True].view(np.int32))
    return {packed: min(spent) for packed, spent in times.items()}


def run(experts: Experts, threads: Sequence[int], rows: Sequence[int], rounds: int) -> dict[str, Any]:
    shape = experts.layout.shape
    hidden, intermediate, count = shape.hidden, shape.intermediate, shape.num_experts
    raw_bytes, packed_bytes = experts.layout.nbytes, experts.used
    say(f"H={hidden}, I={intermediate}, {count} experts of {raw_bytes / 1e6:.2f} MB, packed {packed_bytes / 1e6:.2f}")
    say(f"a thread packs {experts.pack_rate / 1e9:.1f} GB/s and unpacks {experts.unpack_rate / 1e9:.1f}, of raw bytes")
    result: dict[str, Any] = {"pack_rate": experts.pack_rate, "unpack_rate": experts.unpack_rate, "lane": []}
    for team in threads:
        lane = CpuLane(team - 1, hidden, intermediate, torch.bfloat16, experts.layout.parts[1].start)
        for count_rows in rows:
            seconds = lane_s(lane, experts, count_rows, rounds)
            raw_s, packed_s = seconds[False], seconds[True]
            raw, packed = (
                f"{1e6 * took:.0f} us an expert, {nbytes / took / 1e9:.1f} GB/s"
                for took, nbytes in ((raw_s, raw_bytes), (packed_s, packed_bytes))
            )
            say(f"{team} threads, {count_rows} rows: raw {raw}; packed {packed}: {raw_s / packed_s:.2f} times")
            result["lane"].append({"threads": team, "rows": count_rows, "raw_s": raw_s, "packed_s": packed_s})
        lane.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="the caller's and those beside it")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", help="result file")
    args = parser.parse_args()
    experts = Experts(args.hidden, args.intermediate, args.experts)
    result = run(experts, args.threads, args.rows, args.rounds)
    save(result_path("cpu_lane.json", args.out), {"machine": describe_machine(), **vars(args), "result": result})


if __name__ == "__main__":
    main()
