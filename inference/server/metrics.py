"""Counters, gauges and histograms in Prometheus' text format. Not thread-safe: one thread changes them."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator

Labels = tuple[tuple[str, str], ...]

# Bucket limits in seconds: a CPU model's first token may take many, a GPU's next token a few milliseconds.
_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0)
_INTER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class Counter:
    """Only grows; one value for each combination of labels. Without labels it is there from the start."""

    kind = "counter"

    def __init__(self, labelled: bool = False) -> None:
        self.values: dict[Labels, float] = defaultdict(float, {} if labelled else {(): 0.0})

    def add(self, amount: float = 1.0, **labels: str) -> None:
        self.values[tuple(sorted(labels.items()))] += amount

    def samples(self) -> Iterator[tuple[str, Labels, float]]:
        for labels, value in sorted(self.values.items()):
            yield "", labels, value


class Reading:
    """A value that is kept elsewhere; its ``kind`` is gauge or counter."""

    def __init__(self, kind: str, read: Callable[[], float]) -> None:
        self.kind, self._read = kind, read

    def samples(self) -> Iterator[tuple[str, Labels, float]]:
        yield "", (), float(self._read())


class Histogram:
    """Counts of observations at or below each limit, their sum and number."""

    kind = "histogram"

    def __init__(self, limits: tuple[float, ...]) -> None:
        self.limits = limits
        self._counts = [0] * (len(limits) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self.limits, value)] += times
        self._sum += value * times

    def samples(self) -> Iterator[tuple[str, Labels, float]]:
        total = 0
        for limit, count in zip((*self.limits, float("inf")), self._counts, strict=True):
            total += count
            yield "_bucket", (("le", "+Inf" if limit == float("inf") else f"{limit:g}"),), total
        yield "_sum", (), self._sum
        yield "_count", (), total


Metric = Counter | Reading | Histogram


class Metrics:
    """All of a server's. :meth:`text` is what ``/metrics`` answers."""

    def __init__(self) -> None:
        self._all: dict[str, tuple[str, Metric]] = {}
        self.requests = self._counter("planaria_requests_total", "HTTP requests answered, by path and status", True)
        self.cancelled = self._counter("planaria_cancelled_total", "Requests given up as the client went away")
        self.prompt_tokens = self._counter("planaria_prompt_tokens_total", "Tokens of prompts taken in")
        self.new_tokens = self._counter("planaria_new_tokens_total", "Tokens generated")
        self.first_token = Histogram(_FIRST_TOKEN)
        self.add("planaria_time_to_first_token_seconds", "From arrival to the first token", self.first_token)
        self.inter_token = Histogram(_INTER_TOKEN)
        self.add("planaria_inter_token_seconds", "Between two tokens of one answer", self.inter_token)

    def add(self, name: str, text: str, metric: Metric) -> None:
        assert name not in self._all, name
        self._all[name] = (text, metric)

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A value that is asked for when the metrics are read."""
        self.add(name, text, Reading("gauge", read))

    def total(self, name: str, text: str, read: Callable[[], float]) -> None:
        """The same for one that only grows."""
        self.add(name, text, Reading("counter", read))

    def text(self) -> str:
        lines: list[str] = []
        for name, (text, metric) in self._all.items():
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {metric.kind}"]
            lines += [f"{name}{suffix}{_braces(labels)} {value:.17g}" for suffix, labels, value in metric.samples()]
        return "\n".join(lines) + "\n"

    def _counter(self, name: str, text: str, labelled: bool = False) -> Counter:
        counter = Counter(labelled)
        self.add(name, text, counter)
        return counter


def _braces(labels: Labels) -> str:
    if not labels:
        return ""
    escaped = ((k, v.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")) for k, v in labels)
    return "{" + ",".join(f'{key}="{value}"' for key, value in escaped) + "}"
