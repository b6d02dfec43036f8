"""Measures a machine for the cost model, in about two seconds, once for each kind of expert.

What is timed are the very kernels that the runtime uses, on made-up weights larger than the caches. The profile is kept
in the user's cache folder, by hardware, torch, precision and shape of the experts.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import silu

from checkpointing.keeper.memory import total_bytes
from inference.banks import host_memory
from inference.compiled_experts import COMPILED, CompiledExperts, compiled_kernels
from inference.cores import cpu_cores, last_cache_bytes
from inference.costmodel import BYTES, PACKED_BYTES, KernelTable, MachineProfile, ProfileError, Rates, Timing
from inference.cpu_experts import CpuExperts, kernels_for
from inference.expert_block import ExpertBlock, ExpertShape
from inference.gpu_bank import BANK_BYTES, GpuBank
from inference.host_expert import HostExpert, PackedExpert, StoredExpert
from inference.packed import PackedBlock
from inference.packing import pack_into, why_not_packed

TEAMS = (1, 2, 4)
ROWS = (1, 16, 64, 4)  # in this order, as far as the time goes
_MOST_BYTES = 1 << 30  # of made-up experts, where the caches hold many
_FAR_BEHIND = 3.0
_REPEATS = (3, 10)  # of a timing: at least, and at most for a short one
_REPEAT_S = 0.05
_WHOLE_CALL = 8  # experts of one call, as a token of a model with eight choices makes it
_METHOD = 4  # of measuring, and the kernels that are timed: what another found is not looked at


@dataclass(frozen=True)
class ExpertKind:
    """What is timed: experts of this shape and precision, and how the cores have them in host memory."""

    hidden: int
    intermediate: int
    dtype: torch.dtype
    packed: bool = False

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def layout(self) -> ExpertBlock:
        return ExpertBlock(ExpertShape(1, self.hidden, self.intermediate), self.dtype)

    @property
    def nbytes(self) -> int:
        """Of one on the GPU."""
        return 3 * self.hidden * self.intermediate * BYTES[self.dtype_name]

    @property
    def host_nbytes(self) -> int:
        """Of one in host memory."""
        return int(3 * self.hidden * self.intermediate * PACKED_BYTES) if self.packed else self.nbytes


def this_machine(
    hidden: int, intermediate: int, dtype: str, *, packed: bool = False, recalibrate: bool = False
) -> MachineProfile:
    """:func:`machine_profile` of the device that the runtime would choose, for callers without torch.

    ``packed`` if the runtime would pack such experts here: the profile's own ``packed`` says whether.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = ExpertKind(hidden, intermediate, getattr(torch, dtype))
    packed = packed and device.type == "cuda" and why_not_packed(kind.layout, device) is None
    return machine_profile(replace(kind, packed=packed), device, recalibrate=recalibrate)


def machine_profile(kind: ExpertKind, device: torch.device, *, recalibrate: bool = False) -> MachineProfile:
    """This machine's profile: the kept one, or a new one. A damaged file is measured again.

    A new one is kept, unless the machine was busy while it was measured, which is said on stderr.
    """
    file = profile_file(kind, device)
    if not recalibrate and file.exists():
        try:
            return MachineProfile.load(file)
        except ProfileError:
            pass
    profile = calibrate(kind, device)
    if why := profile.unsteady:
        print(
            f"this machine was busy while it was measured: {why}; what it is said to do is too slow, and is not kept: "
            "measure again when nothing else runs",
            file=sys.stderr,
        )
        return profile
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        written = file.with_suffix(f".{os.getpid()}")
        written.write_text(profile.dump())
        written.replace(file)
    except OSError:
        pass  # a read-only home: it will be measured again next time
    return profile


def profile_file(kind: ExpertKind, device: torch.device) -> Path:
    """Where this machine's profile is kept."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    machine = f"{hardware(device)}, {total_bytes() >> 30} GiB"
    key = f"{machine}|{torch.__version__}|{kind.dtype_name}|{kind.hidden}x{kind.intermediate}|{_METHOD}"
    key += "|packed" * kind.packed
    if device.type != "cuda":
        key += f"|{torch.get_num_threads()} threads"
    return home / "planaria" / "profiles" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def hardware(device: torch.device) -> str:
    """In words, without what changes from one start to the next."""
    cores = f"{cpu_cores()} cores of {_cpu_name()}"
    return f"{torch.cuda.get_device_name(device)}, {cores}" if device.type == "cuda" else f"no GPU, {cores}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def calibrate(kind: ExpertKind, device: torch.device, budget_s: float = 2.0) -> MachineProfile:
    """Measure. ``budget_s`` bounds the table of CPU kernels, which takes longest; no part is left out for it."""
    with torch.inference_mode(), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return _calibrate(kind, device, budget_s)


def _calibrate(kind: ExpertKind, device: torch.device, budget_s: float) -> MachineProfile:
    began = time.perf_counter()
    bank = _Bank(kind)
    gpu = GpuBank(kind, device) if device.type == "cuda" else None
    dram = _read_rate(bank.weights_N)
    # Without a GPU the runtime computes with torch's threads, which OMP_NUM_THREADS may have made fewer.
    trials = Trials.of(kind, torch.get_num_threads() if gpu is None else cpu_cores(), gpu is not None)
    threads, team, timings = cpu_table(bank, trials, 0.7 * budget_s - (time.perf_counter() - began))
    table = KernelTable(tuple(timings))
    alone = kind.host_nbytes / table.best(1, threads).seconds
    common = {
        "name": "this machine",
        "hardware": hardware(device),
        "source": f"measured with torch {torch.__version__}",
        "dtype": kind.dtype_name,
        "hidden": kind.hidden,
        "intermediate": kind.intermediate,
        "packed": kind.packed,
        "threads": threads,
        "team": team,
        "cpu": tuple(timings),
        "spread": bank.spread,
        "host_room": total_bytes(),
    }
    dram = max(dram, alone)
    if gpu is None:
        return MachineProfile(
            **common,
            dram=Rates(dram, dram),
            cpu_overlapped=alone,
            launch_s=_operation_s(torch.zeros(8)),
            fill=bank.fill_rate(),
        )
    link = gpu.link_rate()
    with_reads = gpu.beside_link(lambda: _read_s(bank.weights_N), bank.weights_N.nbytes)
    with bank.experts(threads, team, table) as experts:
        with_experts = gpu.beside_link(lambda: bank.call_s(experts, 1), _WHOLE_CALL * kind.host_nbytes)
        handover = _typical(experts.hand_over)
    profile = MachineProfile(
        **common,
        dram=Rates(dram, min(with_reads[1], dram)),
        cpu_overlapped=min(with_experts[1], alone),
        link=Rates(link, min(with_experts[0], link)),
        gpu=gpu.table(),
        gpu_memory=gpu.memory_rate(),
        gpu_flops=gpu.flops(),
        gpu_room=torch.cuda.get_device_properties(device).total_memory,
        launch_s=_operation_s(torch.zeros(8, device=device)),
        sync_s=_typical(gpu.round_trip),
        handover_s=handover,
    )
    gpu.close()
    return profile


@dataclass(frozen=True)
class Trials:
    """What is tried: kernels, and (threads, team) pairs, the likeliest first."""

    kernels: tuple[str, ...]
    crews: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, kind: ExpertKind, cores: int, with_gpu: bool) -> Trials:
        """Without a GPU experts are computed by one product on all of them, then torch's threads.

        Beside one, by the best of all kernels on all cores but two, or on half of them, in small teams: one core
        launches the GPU's work and helps, one is left to the rest of the machine. A call ends with its last thread, and
        one that has to wait for a core ends late.
        """
        if not with_gpu:
            return cls(("linear",), ((cores, cores),))
        most = max(cores - 2, 1)
        counts = sorted({most, max(most // 2, 1)}, reverse=True)
        crews = tuple((n, team) for n in counts for team in TEAMS if team <= n)
        return cls((*kernels_for(kind.dtype), *compiled_kernels(kind.dtype)), crews)


def cpu_table(bank: _Bank, trials: Trials, budget_s: float) -> tuple[int, int, list[Timing]]:
    """The best count of threads, in what teams, and the times of every kernel.

    Counts and teams are tried with one row, which is what decoding needs, as far as half of the time goes; the best of
    them with 16 rows, and with others while there is time. A kernel that is far behind the first time is left out, and
    row by row takes a row's time for each, so it is not timed beyond one. The compiled kernel knows no teams.
    """
    began = time.perf_counter()
    kernels, tried = trials.kernels, []
    for threads, team in trials.crews:
        if tried and time.perf_counter() - began > budget_s / 2:
            break
        here = [bank.timing(kernel, threads, team, 1) for kernel in kernels if kernel != COMPILED or team == 1]
        if not here:  # only the compiled kernel is left
            continue
        tried += [(timing, team) for timing in here]
        slow = _FAR_BEHIND * min(one.seconds for one in here)
        kernels = tuple(k for k in kernels if all(t.seconds < slow for t in here if t.kernel == k))
    fastest, team = min(tried, key=lambda one: (one[0].seconds, one[0].threads, one[1]))
    best = fastest.threads
    found = [timing for timing, theirs in tried if (timing.threads, theirs) == (best, team)]
    for rows in ROWS[1:]:
        for kernel in dict.fromkeys(timing.kernel for timing in found):
            if kernel != "rows" and (rows == ROWS[1] or time.perf_counter() - began < budget_s):
                found.append(bank.timing(kernel, best, team, rows))
    return best, team, found


class _Bank:
    """Made-up experts in host memory, one behind the other."""

    def __init__(self, kind: ExpertKind) -> None:
        self.kind = kind
        self._layout = kind.layout
        # Small and unequal, and quick to make: products of zeros or denormal numbers are no measure.
        one_B = ((torch.arange(self._layout.elements) % 251 - 125).float() / 4096).to(kind.dtype)
        if kind.packed:
            block_B, one_B = one_B, torch.zeros(PackedBlock(len(one_B)).stride, dtype=torch.uint8)
            pack_into(block_B, one_B)
        nbytes = min(max(BANK_BYTES, 2 * last_cache_bytes()), _MOST_BYTES)
        self.count = max(nbytes // one_B.nbytes, _WHOLE_CALL)
        self.weights_N = host_memory(self.count * len(one_B), one_B.dtype)
        self._blocks = self.weights_N.view(self.count, -1)
        self._blocks.copy_(one_B)
        self._next = 0
        self.spread = 1.0  # the worst of all timings, typical over best

    def __call__(self, _layer: int, expert: int) -> StoredExpert:
        block = self._blocks[expert]
        if self.kind.packed:
            return PackedExpert(block, self._layout)
        return HostExpert.of_parts(self._layout.split(block), self._layout.shape.form)

    def experts(self, threads: int, team: int, table: KernelTable) -> CpuExperts:
        compiled = None
        if any(timing.kernel == COMPILED for timing in table.timings):
            sizes = (self.kind.hidden, self.kind.intermediate, self.kind.dtype)
            compiled = CompiledExperts(threads, *sizes, self._layout.parts[1].start)
        return CpuExperts(self, lambda gate, up: silu(gate) * up, table, threads, team, compiled)

    def timing(self, kernel: str, threads: int, team: int, rows: int) -> Timing:
        count, times = _WHOLE_CALL if rows == 1 else 2 * threads, []
        with self.experts(threads, team, KernelTable((Timing(kernel, threads, 1, 1.0),))) as experts:
            self.call_s(experts, rows, count)  # the first call starts threads
            while len(times) < _REPEATS[0] or (len(times) < _REPEATS[1] and sum(times) < _REPEAT_S):
                times.append(self.call_s(experts, rows, count))
        self.spread = max(self.spread, median(times) / min(times))
        return Timing(kernel, threads, rows, min(times) / count)

    def fill_rate(self) -> float:
        """Bytes/s of reading experts from a file that the system has in memory, one after the other, into slots."""
        size = self._blocks[0].nbytes
        slots = [memoryview(block.view(torch.uint8).numpy()) for block in self._blocks[: max(BANK_BYTES // size, 1)]]
        file, times = os.memfd_create("experts"), []
        try:
            for slot in slots:
                os.write(file, slot)
            for _ in range(_REPEATS[0]):
                began = time.perf_counter()
                for number, slot in enumerate(slots):
                    os.preadv(file, [slot], number * size)
                times.append(time.perf_counter() - began)
        finally:
            os.close(file)
        return len(slots) * size / min(times)

    def call_s(self, experts: CpuExperts, rows: int, count: int = _WHOLE_CALL) -> float:
        """Seconds of one call, with other experts each time."""
        chosen = [(self._next + i) % self.count for i in range(count)]
        self._next += count
        x_NH = torch.ones(rows * count, self.kind.hidden, dtype=self.kind.dtype)
        began = time.perf_counter()
        experts.submit(0, [(e, rows) for e in chosen], x_NH).result()
        return time.perf_counter() - began


def _read_s(data_N: Tensor) -> float:
    began = time.perf_counter()
    data_N.view(torch.int64).sum()
    return time.perf_counter() - began


def _read_rate(data_N: Tensor) -> float:
    return data_N.nbytes / min(_read_s(data_N) for _ in range(3))


def _operation_s(x_N: Tensor) -> float:
    """Of issuing one operation that makes a tensor, a hundred in a row."""
    for _ in range(20):
        torch.add(x_N, x_N)
    began = time.perf_counter()
    for _ in range(100):
        torch.add(x_N, x_N)
    return (time.perf_counter() - began) / 100


def _typical(act: Callable[[], object], repeats: int = 15) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        act()
        times.append(time.perf_counter() - began)
    return median(times)
