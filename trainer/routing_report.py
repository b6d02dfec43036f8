"""How the steps since the last report were routed: summed over ranks, written to the events, and a few words of it."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from moe.stats import RoutingMeter
from trainer.events import EventLog
from trainer.rendezvous import Process


def report_routing(meter: RoutingMeter, process: Process, events: EventLog, step: int) -> str:
    """Write the `routing` row of ``step``, on rank 0. Call it on every rank: it is one small all-reduce.

    Returns what to print; "" if nothing was routed, and on other ranks.
    """

    def total(counts: Tensor) -> Tensor:
        if process.world > 1:
            dist.all_reduce(counts)
        return counts

    stats = meter.take(total)
    if stats is None or process.rank != 0:
        return ""
    events.write("routing", step=step, **stats.figures())
    return stats.brief()
