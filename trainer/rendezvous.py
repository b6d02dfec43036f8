"""How the workers of one attempt find each other.

torchrun restarts workers against a store that may still hold the addresses of the dead attempt. So the process group is
made here, before DeepSpeed would make one, over a store whose keys carry the attempt.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from trainer.supervisor import STORE_VARIABLE

_PR_SET_PDEATHSIG = 1


class DeviceError(ValueError):
    """The recipe asks for a device that is not here."""


@dataclass(frozen=True)
class Process:
    """This worker's place in the job."""

    rank: int
    world: int
    local_rank: int
    device: torch.device
    held: list[object] = field(default_factory=list)  # what must live as long as the process

    @property
    def coordinate(self) -> str:
        """Logical name of this worker's share of the state; all parallelism here is data x expert, ordered by rank."""
        return f"dp{self.rank:04d}"

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of ``tensor`` over all workers. A collective; may overwrite its argument."""
        tensor = tensor.to(self.device)
        dist.all_reduce(tensor)
        return tensor


def die_with_launcher() -> None:
    """Have the kernel kill this worker when the process that started it dies, so that no worker outlives its job."""
    launcher = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # it died before the request
        os.kill(os.getpid(), signal.SIGKILL)


def process_started() -> float:
    """When this process was started, as ``time.time`` tells it, to 10 ms."""
    ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age_s


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """``auto`` is CUDA if there is one. Raises DeviceError when CUDA is wanted and absent."""
    if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()):
        if not torch.cuda.is_available():
            raise DeviceError("parallel.device is cuda, but torch sees no GPU; use parallel.device=cpu")
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def join(device_wanted: str, timeout: timedelta = timedelta(minutes=30)) -> Process:
    """Create the default process group from the launcher's environment: gloo on CPU, NCCL on GPU."""
    environment = os.environ
    rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    local_rank = int(environment.get("LOCAL_RANK", rank))
    restart = int(environment.get("TORCHELASTIC_RESTART_COUNT", 0))  # only torchrun restarts
    device = choose_device(device_wanted, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    agent_hosts_store = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    bound = environment.get(STORE_VARIABLE)  # our own launcher's: a socket that nobody else can take
    store = dist.TCPStore(
        environment["MASTER_ADDR"],
        int(environment["MASTER_PORT"]),
        world,
        is_master=rank == 0 and not agent_hosts_store,
        timeout=timedelta(minutes=5),
        master_listen_fd=int(bound) if bound else None,
    )
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore(f"restart-{restart}", store),
        rank=rank,
        world_size=world,
        timeout=timeout,
    )
    return Process(rank, world, local_rank, device)
