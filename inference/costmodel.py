"""What an expert costs on each lane of a machine: the link, the CPU, the GPU. Values and formulas; no torch here.

Rates are bytes per second, times seconds. A link and CPU cores read the same host memory, so each rate is known twice:
*alone*, and *overlapped*, while the other lane is busy too. Where memory is the limit the overlapped rates add up to
its bandwidth; where the cores are, they add up to almost the plain sum. The formulas need not know which it is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from inference.errors import InferenceError

_TINY = 1e-30
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Of a packed weight that is read or crosses the link, see inference.packed: what else is used of a block is under a
# hundredth. In host memory a block has room for more exceptions than most have, see inference.packed_block.
PACKED_BYTES = 1.5
UNPACKED_BYTES = 2  # of the same weight on the GPU
PROFILES = Path(__file__).parent / "profiles"
_UNSTEADY = 3.0  # typical over best of one timing's repeats
_ABSURD = 8.0  # an expert of more rows that much faster: small experts differ by what a call costs, not so far


class ProfileError(InferenceError):
    """A machine profile that cannot be read, or does not exist: what, where, and what to do."""


@dataclass(frozen=True)
class Rates:
    """Bytes per second of one lane, alone and while the other one works. Overlapping never makes a lane faster."""

    alone: float
    overlapped: float

    def __post_init__(self) -> None:
        if not 0 < self.overlapped <= self.alone:
            raise ProfileError(
                f"rates {self.alone:g} alone, {self.overlapped:g} overlapped: need 0 < overlapped <= alone"
            )


@dataclass(frozen=True)
class Timing:
    """One expert of ``rows`` rows by one kernel on so many threads, in seconds: a call's time over its experts."""

    kernel: str
    threads: int
    rows: int
    seconds: float


@dataclass(frozen=True)
class MachineProfile:
    """What was measured on a machine, for experts of one shape and precision.

    Attributes:
        name: what ``--profile`` calls it.
        hardware: in words.
        source: who measured it, when and how, or which figures were taken from where.
        dtype: of the experts that were timed, as ``bfloat16``.
        packed: the cores had them packed in host memory.
        hidden, intermediate: their sizes.
        threads: for CPU experts, as many as were fastest; ``team`` of them compute one, or a part of it, together.
        link: host to device, pinned, in blocks of an expert's size; None without a GPU.
        fill: of experts that are read from files in the system's cache into slots in host memory; 0 with a GPU.
        gpu_room, host_room: bytes of memory that there are; 0 if that is not known.
        dram: host memory as the cores read it, on ``threads`` threads.
        cpu: experts computed by the cores, from host memory.
        cpu_overlapped: bytes/s of weights that the best one-row CPU kernel reads while the link is busy.
        gpu: experts computed by the GPU, weights resident; empty without one.
        gpu_memory, gpu_flops: bytes/s of its memory and FLOP/s of its matrix products, for the dense part; 0 without.
        launch_s: of one operation, as the runtime issues it.
        sync_s: one round trip to learn what the device computed; 0 without a GPU.
        handover_s: from giving work to the CPU experts until they begin, and back.
        spread: of the repeats of a CPU timing, the typical over the best; the worst of all timings.
    """

    name: str
    hardware: str
    source: str
    dtype: str
    hidden: int
    intermediate: int
    threads: int
    dram: Rates
    cpu: tuple[Timing, ...]
    cpu_overlapped: float
    team: int = 1
    link: Rates | None = None
    gpu: tuple[Timing, ...] = ()
    gpu_memory: float = 0.0
    gpu_flops: float = 0.0
    launch_s: float = 0.0
    sync_s: float = 0.0
    handover_s: float = 0.0
    spread: float = 1.0
    packed: bool = False
    fill: float = 0.0
    gpu_room: int = 0
    host_room: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in BYTES or min(self.hidden, self.intermediate, self.threads, self.team) < 1 or not self.cpu:
            raise ProfileError(f"profile {self.name!r}: needs a dtype of {', '.join(BYTES)}, sizes, and CPU timings")
        if any(t.seconds <= 0 or t.rows < 1 or t.threads < 1 for t in (*self.cpu, *self.gpu)):
            raise ProfileError(f"profile {self.name!r}: a timing without rows, threads or seconds; measure it again")
        if self.link is not None and not (self.gpu and self.gpu_memory > 0 and self.gpu_flops > 0):
            raise ProfileError(f"profile {self.name!r}: has a link but not what the GPU behind it does")
        if self.link is None and not self.fill > 0:
            raise ProfileError(f"profile {self.name!r}: no GPU, nor how fast slots fill; measure it again")

    @property
    def elements(self) -> int:
        """Of the expert that was timed."""
        return 3 * self.hidden * self.intermediate

    @property
    def expert_bytes(self) -> int:
        """Of the expert that was timed, as it lay in host memory."""
        return int(self.elements * (PACKED_BYTES if self.packed else BYTES[self.dtype]))

    @property
    def device_bytes(self) -> int:
        """Of the expert that was timed, as it lay on the GPU."""
        return self.elements * BYTES[self.dtype]

    @property
    def unsteady(self) -> str | None:
        """What cannot be of an idle machine, in words."""
        if self.spread > _UNSTEADY:
            return f"the same work took {self.spread:.1f} times as long again"
        for few in self.cpu:
            for many in self.cpu:
                same = (few.kernel, few.threads) == (many.kernel, many.threads)
                if same and few.rows < many.rows and few.seconds > _ABSURD * many.seconds:
                    return f"{few.rows} rows took {few.seconds * 1e3:.2f} ms, {many.rows} {many.seconds * 1e3:.2f} ms"
        return None

    def dump(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def load(cls, path: str | Path) -> MachineProfile:
        """Raises ProfileError for a file that is no profile."""
        try:
            raw = json.loads(Path(path).read_text())
            raw |= {"dram": Rates(**raw["dram"]), "link": None if raw["link"] is None else Rates(**raw["link"])}
            raw |= {lane: tuple(Timing(**entry) for entry in raw[lane]) for lane in ("cpu", "gpu")}
            return cls(**raw)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ProfileError(f"{path}: not a machine profile ({error}); give the file of another") from error


def named_profile(name: str) -> MachineProfile:
    """A profile that comes with the package, or the JSON file of that path. Raises ProfileError."""
    if (PROFILES / f"{name}.json").is_file():
        return MachineProfile.load(PROFILES / f"{name}.json")
    if Path(name).is_file():
        return MachineProfile.load(name)
    known = ", ".join(sorted(path.stem for path in PROFILES.glob("*.json")))
    raise ProfileError(f"no profile {name!r}: choose from {known}, or give the path of a profile's JSON file")


@dataclass(frozen=True)
class KernelTable:
    """Measured times, between them straight lines: which kernel is fastest for so many rows on so many threads."""

    timings: tuple[Timing, ...]
    _found: dict[tuple[int, int, str], Timing] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def _curves(self) -> dict[tuple[str, int], list[tuple[int, float]]]:
        curves: dict[tuple[str, int], list[tuple[int, float]]] = {}
        for t in sorted(self.timings, key=lambda t: t.rows):
            curves.setdefault((t.kernel, t.threads), []).append((t.rows, t.seconds))
        return curves

    @property
    def thread_counts(self) -> tuple[int, ...]:
        return tuple(sorted({t.threads for t in self.timings}))

    def best(self, rows: int, threads: int, without: str = "") -> Timing:
        """The fastest for ``rows`` on the largest measured count of threads that is at most ``threads``.

        On fewer than were ever measured, the fewest. Of equally fast kernels the first by name; ``linear`` if none but
        ``without`` was measured.
        """
        key = (rows, threads, without)
        if key not in self._found:
            counts = self.thread_counts
            used = max((n for n in counts if n <= threads), default=counts[0])
            curves = {kernel: curve for (kernel, n), curve in self._curves.items() if n == used and kernel != without}
            times = [(at(curve, rows), kernel) for kernel, curve in curves.items()]
            seconds, kernel = min(times, default=(math.inf, "linear"))
            self._found[key] = Timing(kernel, used, rows, seconds)
        return self._found[key]


def at(curve: Sequence[tuple[int, float]], rows: int) -> float:
    """Seconds for ``rows``: on lines between measured points, flat before the first, in proportion beyond the last.

    A curve never falls: more rows take no less time, however noisy the measurement was.
    """
    before, best = 0, curve[0][1]
    for point, seconds in curve:
        high = max(seconds, best)
        if rows <= point:
            return best + (high - best) * (rows - before) / (point - before)
        before, best = point, high
    return best * rows / before


@dataclass(frozen=True)
class ExpertCosts:
    """What one expert of a model costs on the lanes of a machine; times scale with the sizes of the one that was timed.

    Attributes:
        expert_bytes: of one expert as it lies in host memory.
        device_bytes: as it lies on the GPU.
        link_s, link_overlapped_s: to bring it to the GPU, alone and beside busy cores; infinite without a link.
        threads: that the CPU lane may use; 0 for none: the CPU computes nothing.
        handover_s: for a call to use the CPU lane at all: the workers' start, and the results' way back to the GPU.
    """

    profile: MachineProfile
    expert_bytes: int
    device_bytes: int
    threads: int
    link_s: float
    link_overlapped_s: float
    handover_s: float
    _cpu: KernelTable
    _gpu: KernelTable
    _lanes: dict[int, tuple[float, float, float]] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(
        cls, profile: MachineProfile, hidden: int, intermediate: int, itemsize: float, threads: int | None = None
    ) -> ExpertCosts:
        """``threads`` of the CPU lane: by default as many as the profile has; 0 leaves the lane out. ``itemsize``: of a
        weight in host memory, :data:`PACKED_BYTES` of packed ones. If others were timed, times scale with it.
        """
        elements = 3 * hidden * intermediate
        size, link = int(elements * itemsize), profile.link
        return cls(
            profile=profile,
            expert_bytes=size,
            device_bytes=elements * (UNPACKED_BYTES if itemsize == PACKED_BYTES else int(itemsize)),
            threads=profile.threads if threads is None else threads,
            link_s=math.inf if link is None else size / link.alone,
            link_overlapped_s=math.inf if link is None else size / link.overlapped,
            handover_s=profile.handover_s + profile.sync_s if link is not None else 0.0,
            _cpu=KernelTable(profile.cpu),
            _gpu=KernelTable(profile.gpu),
        )

    @property
    def packed(self) -> bool:
        """In host memory, and on the link."""
        return self.expert_bytes < self.device_bytes

    @property
    def has_link(self) -> bool:
        return self.profile.link is not None

    @property
    def fill_s(self) -> float:
        """To read it into a slot in host memory."""
        return self.expert_bytes / self.profile.fill

    def lanes(self, rows: int) -> tuple[float, float, float]:
        """:meth:`cpu_s`, :meth:`cpu_overlapped_s` and :meth:`gpu_s`, remembered."""
        found = self._lanes.get(rows)
        if found is None:
            found = self._lanes[rows] = self.cpu_s(rows), self.cpu_overlapped_s(rows), self.gpu_s(rows)
        return found

    def cpu_s(self, rows: int) -> float:
        """The cores alone; infinite where they may not help. Fewer threads than were measured take longer."""
        if not self.threads:
            return math.inf
        best = self._cpu.best(rows, self.threads)
        scale = self.expert_bytes / self.profile.expert_bytes
        return best.seconds * scale * max(best.threads / self.threads, 1.0)

    def cpu_overlapped_s(self, rows: int) -> float:
        """Beside a busy link: few rows wait for memory, many for the cores, which the link does not slow down."""
        return max(self.cpu_s(rows), self.expert_bytes / self.profile.cpu_overlapped)

    def gpu_s(self, rows: int) -> float:
        """On the GPU, its weights there; 0 without a GPU, where nothing is ever there."""
        if not self.profile.gpu:
            return 0.0
        return self._gpu.best(rows, 1).seconds * self.device_bytes / self.profile.device_bytes


def describe(profile: MachineProfile) -> list[str]:
    """The figures, a line each."""
    table = KernelTable(profile.cpu)
    best = table.best(1, profile.threads)
    memory = f"host memory: {_gb(profile.dram.alone)} alone"
    weights = "packed weights" if profile.packed else "weights"
    experts = f"CPU experts: {_gb(profile.expert_bytes / best.seconds)} of {weights} at one row"
    experts += f" ({best.kernel}, {best.threads} threads)"
    lines = [f"machine: {profile.hardware}", f"figures: {profile.source}"]
    if profile.link is None:
        return [*lines, memory, experts, f"slots: {_gb(profile.fill)} from files in the system's cache"]
    return [
        *lines,
        f"link: {_gb(profile.link.alone)} alone, {_gb(profile.link.overlapped)} beside the cores",
        f"{memory}, {_gb(profile.dram.overlapped)} beside the link",
        f"{experts}, {_gb(profile.cpu_overlapped)} beside the link",
    ]


def _gb(rate: float) -> str:
    return f"{rate / 1e9:.3g} GB/s"


def overlap(link: tuple[np.ndarray, np.ndarray], cpu: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """When each lane ends if both start together; elementwise, numbers are welcome.

    Args:
        link, cpu: seconds of its work (alone, overlapped); alone is never the longer.

    The shorter one runs beside the other to its end; what the longer one still has to do then, it does alone.
    """
    together = np.minimum(link[1], cpu[1])  # 0 where a lane has nothing to do: then the other one is alone all along
    link_left, cpu_left = (1 - together / np.maximum(beside, _TINY) for _, beside in (link, cpu))
    return together + link_left * link[0], together + cpu_left * cpu[0]


def distinct_experts(experts: int, top_k: int, tokens: int) -> float:
    """How many experts of a layer ``tokens`` tokens use together, if they choose independently and evenly."""
    return experts * (1 - (1 - top_k / experts) ** tokens)


@dataclass(frozen=True)
class Floor:
    """What no schedule can pass: the lanes' own times if all of them overlap perfectly."""

    host_s: float
    link_s: float
    gpu_s: float
    products_s: float

    @property
    def seconds(self) -> float:
        return max(self.host_s, self.link_s, self.gpu_s, self.products_s)

    @property
    def bound(self) -> str:
        """The slowest lane."""
        lanes = {
            "host memory": self.host_s,
            "the link": self.link_s,
            "GPU memory": self.gpu_s,
            "matrix products": self.products_s,
        }
        return max(lanes, key=lanes.__getitem__)


def physical_floor(
    profile: MachineProfile, *, missed_bytes: float, fetched_bytes: float, device_bytes: float, flops: float = 0.0
) -> Floor:
    """Of a token or any stretch of work.

    Args:
        missed_bytes: of experts that were not resident, fetched or computed by the CPU.
        fetched_bytes: those that crossed the link.
        device_bytes: that the GPU reads: the dense part, resident experts used, fetched ones. Without a GPU, all that
            the cores read.
        flops: of all matrix products.
    """
    if profile.link is None:
        return Floor((missed_bytes + device_bytes) / profile.dram.alone, 0.0, 0.0, flops / cpu_flops(profile))
    host = profile.link.overlapped + profile.dram.overlapped
    device = device_bytes / profile.gpu_memory
    return Floor(missed_bytes / host, fetched_bytes / profile.link.alone, device, flops / profile.gpu_flops)


def cpu_flops(profile: MachineProfile) -> float:
    """FLOP/s of the best timed expert."""
    best = max(profile.cpu, key=lambda timing: timing.rows / timing.seconds)
    return 6 * profile.hidden * profile.intermediate * best.rows / best.seconds


def total(values: Iterable[float]) -> float:
    """An exactly rounded sum, so that predictions do not depend on the order of experts."""
    return math.fsum(values)
