"""What a figure depends on besides the code: hardware, clock, versions, commit. And where results go."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

GIB = 1 << 30
_PACKAGES = ("torch", "deepspeed", "transformers", "xxhash", "numpy")


def describe_machine() -> dict[str, Any]:
    """Hardware and versions, as a result file records them."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": _first_of("/proc/cpuinfo", "model name"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(_first_of("/proc/meminfo", "MemTotal").split()[0] or 0) / (1 << 20), 1),
        "gpus": gpus,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "versions": {name: _version(name) for name in _PACKAGES},
        "commit": commit(),
    }


def _first_of(path: str, key: str) -> str:
    for line in Path(path).read_text().splitlines():
        if line.startswith(key):
            return line.partition(":")[2].strip()
    return "0"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def commit() -> str:
    """The commit of the working tree, with ``+`` if it was changed; PLANARIA_COMMIT where there is no git."""
    root = Path(__file__).parent
    try:
        ask = {"cwd": root, "capture_output": True, "text": True, "check": True, "timeout": 20}
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **ask).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **ask).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("PLANARIA_COMMIT", "unknown")
    return head + ("+" if changed else "")


def result_path(name: str, given: str | None) -> Path:
    """Where a script writes its JSON: as told, else into the folder that the variable OUT names, else build/."""
    path = Path(given) if given else Path(os.environ.get("OUT") or "build") / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def save(path: Path, result: dict[str, Any]) -> None:
    """Write a result whole or not at all: it is written again after every arm, and the time may run out."""
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(result, indent=1, default=str) + "\n")
    temporary.rename(path)


def say(text: str) -> None:
    print(text, flush=True)


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that ``work`` takes: of this process on a CPU, of the clock on a GPU, with everything queued done."""
    if device.type == "cpu":
        started = time.process_time()  # others may use the cores
        work()
        return time.process_time() - started
    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - started
