"""Whether what one stream reads was ordered behind what another wrote, told on a CPU, where all runs at once.

Every operation counts on the stream that would be current on a GPU, streams know of each other what they have waited
for (vector clocks), and every tensor's memory remembers who wrote and who read it last. Exchanges run on a stream of
their group, as NCCL's do.
"""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import moe.exchange
import moe.guests


class Streams(TorchDispatchMode):
    """``wrong``: what was read or overwritten too early, or might have been given away before."""

    def __init__(self, joins=True):
        super().__init__()
        self.joins, self.wrong, self.current = joins, [], "main"
        self.clocks, self.writes, self.reads = {}, {}, {}
        self.makers, self.lent, self._alive = {}, set(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._schema.name.startswith("c10d") or func.is_view:  # see :meth:`exchange`; a view reads nothing
            return out
        written = [
            value
            for value, argument in zip(args, func._schema.arguments, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        self.note(str(func), self.current, read=(args, kwargs), written=(written, out))
        return out

    def note(self, what, stream, read, written):
        """An operation. What is written is a new tensor or one of those read."""
        clock = self.clocks.setdefault(stream, {})
        clock[stream] = clock.get(stream, 0) + 1
        read, written = memories(read), memories(written)
        for memory in {**read, **written}:
            # What was there before is read first.
            maker = self.makers.setdefault(memory, "main" if memory in read else self.current)
            if stream == "main" and maker == "aside" and memory not in self.lent:
                self.wrong.append(f"{what} uses memory that the side stream may give away")
        for memory in read:
            self._after(what, stream, [self.writes.get(memory)])
            self.reads.setdefault(memory, {})[stream] = clock[stream]
        for memory in written:
            self._after(what, stream, [self.writes.get(memory), *self.reads.get(memory, {}).items()])
            self.writes[memory] = (stream, clock[stream])
        self._alive += [*read.values(), *written.values()]  # an address stands for one memory throughout

    def _after(self, what, stream, earlier):
        for other, tick in filter(None, earlier):
            if self.clocks[stream].get(other, 0) < tick:
                self.wrong.append(f"{what} on {stream} does not wait for {other}")

    def wait(self, clock):
        """The current stream waits for all that a clock tells of."""
        mine = self.clocks.setdefault(self.current, {})
        mine.update({stream: max(tick, mine.get(stream, 0)) for stream, tick in clock.items()})

    @contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def exchange(self, begin, group):
        """``begin(out, x, ...)``, as NCCL orders it."""

        def begun(out, x, *args, **kwargs):
            clock = dict(self.clocks.setdefault(self.current, {}))
            stream = f"exchange {group(args, kwargs)}"
            with self.on(stream):
                self.wait(clock)
            self.note("exchange", stream, read=x, written=out)
            return Work(self, begin(out, x, *args, **kwargs), dict(self.clocks[stream]))

        return begun


def memories(tensors):
    return {t.untyped_storage()._cdata: t for t in tree_leaves(tensors) if isinstance(t, torch.Tensor) and t.numel()}


class Work:
    def __init__(self, streams, work, clock):
        self.streams, self.work, self.clock = streams, work, clock

    def wait(self):
        self.work.wait()
        self.streams.wait(self.clock)


@contextmanager
def watched(joins=True):
    """``joins``: whether the side stream is ever waited for."""
    streams = Streams(joins)

    class Aside:
        def __init__(self, device):
            with streams.on("aside"):
                streams.wait(dict(streams.clocks.get("main", {})))

        def queue(self):
            return streams.on("aside")

        def join(self, *made):
            streams.lent.update(memories(made))
            if streams.joins:
                streams.wait(streams.clocks["aside"])

    names = [(moe.guests, "Aside"), (moe.exchange, "all_to_all"), (moe.exchange, "_all_gather")]
    before = [getattr(owner, name) for owner, name in names]
    made = (
        Aside,
        streams.exchange(before[1], lambda args, kwargs: id(args[2])),
        streams.exchange(before[2], lambda args, kwargs: id(kwargs["group"])),
    )
    for (owner, name), value in zip(names, made, strict=True):
        setattr(owner, name, value)
    try:
        with streams:
            yield streams
    finally:
        for (owner, name), value in zip(names, before, strict=True):
            setattr(owner, name, value)
