"""Which process a drill kills, when and where, and what it does to the disk (no torch here)."""

from __future__ import annotations

from dataclasses import dataclass

POINTS = ("forward", "optimizer", "capture", "disk")
VICTIMS = ("worker", "keeper", "both")
DISK_FAULTS = {"throttle": "bytes_per_s", "full": "", "hang": "seconds"}  # and the number that each needs


class FaultError(ValueError):
    """A kill specification that means nothing; the message names the field."""


@dataclass(frozen=True)
class KillSpec:
    """One SIGKILL: in step ``step`` (from 1) of worker ``rank``, at the named point.

    >>> str(KillSpec.parse("rank=1,step=7,at=capture"))
    'rank=1,step=7,at=capture,who=worker'

    Raises FaultError for a field out of range.
    """

    rank: int
    step: int
    at: str = "forward"
    who: str = "worker"

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise FaultError(f"kill: rank={self.rank} is negative; workers count from 0")
        if self.step < 1:
            raise FaultError(f"kill: step={self.step} is too small; steps count from 1")
        if self.at not in POINTS:
            raise FaultError(f"kill: at={self.at!r} is no point of a step; choose {', '.join(POINTS)}")
        if self.who not in VICTIMS:
            raise FaultError(f"kill: who={self.who!r} is nobody; choose {', '.join(VICTIMS)}")

    @classmethod
    def parse(cls, text: str) -> KillSpec:
        """Inverse of ``str``; ``at`` and ``who`` may be left out. Raises FaultError."""
        fields: dict[str, str] = {}
        for part in text.split(","):
            name, equals, value = part.strip().partition("=")
            if not equals or name not in ("rank", "step", "at", "who"):
                raise FaultError(f"kill: {part.strip()!r} is no field; write rank=N,step=N,at=POINT,who=VICTIM")
            if name in fields:
                raise FaultError(f"kill: {name} is given twice; keep one")
            fields[name] = value
        numbers = {}
        for name in ("rank", "step"):
            if name not in fields:
                raise FaultError(f"kill: {name} is missing; write e.g. rank=1,step=7,at=forward")
            if not (fields[name].isascii() and fields[name].isdecimal()):
                raise FaultError(f"kill: {name}={fields[name]!r} is not a whole number")
            numbers[name] = int(fields[name])
        return cls(numbers["rank"], numbers["step"], fields.get("at", cls.at), fields.get("who", cls.who))

    def __str__(self) -> str:
        return f"rank={self.rank},step={self.step},at={self.at},who={self.who}"


@dataclass(frozen=True)
class DiskFaultSpec:
    """What the keeper's disk does to the writes of steps ``first`` to ``last`` (-1: to all later ones).

    >>> str(DiskFaultSpec.parse("kind=throttle,bytes_per_s=1000000"))
    'kind=throttle,bytes_per_s=1000000,seconds=0,first=0,last=-1'

    Raises FaultError for a field out of range.
    """

    kind: str
    bytes_per_s: int = 0
    seconds: int = 0
    first: int = 0
    last: int = -1

    def __post_init__(self) -> None:
        if self.kind not in DISK_FAULTS:
            raise FaultError(f"disk fault: kind={self.kind!r} is unknown; choose {', '.join(DISK_FAULTS)}")
        needed = DISK_FAULTS[self.kind]
        if needed and getattr(self, needed) < 1:
            raise FaultError(f"disk fault: {self.kind} needs {needed}=N of at least 1")

    @classmethod
    def parse(cls, text: str) -> DiskFaultSpec:
        """Inverse of ``str``; all but ``kind`` may be left out. Raises FaultError."""
        kind, numbers = "", {}
        for part in text.split(","):
            name, _, value = part.strip().partition("=")
            if name == "kind":
                kind = value
            elif name not in ("bytes_per_s", "seconds", "first", "last"):
                raise FaultError(
                    f"disk fault: {part.strip()!r} is no field; write kind=throttle|full|hang"
                    "[,bytes_per_s=N][,seconds=N][,first=STEP][,last=STEP]"
                )
            elif not (value.isascii() and value.removeprefix("-").isdecimal()):
                raise FaultError(f"disk fault: {name}={value!r} is not a whole number")
            else:
                numbers[name] = int(value)
        return cls(kind, **numbers)

    def __str__(self) -> str:
        return ",".join(f"{name}={value}" for name, value in self.fields().items())

    def fields(self) -> dict[str, str | int]:
        """As the keeper takes it."""
        return dict(vars(self))
