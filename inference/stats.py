"""What the runtime made and what it took, as values. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from inference.requests import TokenLogprobs


@dataclass(frozen=True)
class Generation:
    """What one prompt led to.

    Attributes:
        text: the new tokens decoded; empty without a tokenizer.
        token_ids: the new tokens, an end-of-sequence token included.
        prompt_ids: the prompt as the model saw it.
        finish: ``eos``, ``stop`` or ``length``, see :class:`inference.requests.Output`.
        logprobs: one for each new token if they were asked for, else empty.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_ids: tuple[int, ...]
    finish: str
    logprobs: tuple[TokenLogprobs, ...] = ()


def hit_rate(hits: int, misses: int, cpu_experts: int) -> float:
    """Of the experts that layer calls wanted; what the CPU computed was not resident either."""
    return hits / max(hits + misses + cpu_experts, 1)


@dataclass(frozen=True)
class Stats:
    """Totals since the model was opened. Seconds are wall time of the engine's steps, prompts included.

    Attributes:
        hits, misses, cpu_experts: one for each distinct expert of a layer call: resident or on its way, fetched for the
            call, or computed by the CPU beside a GPU.
        bytes_fetched: over the link, on demand or ahead. Without a GPU, copied into slots, as stored in the files.
        prefetched: experts that were fetched ahead and have since been used (hits) or evicted unused.
    """

    hits: int
    misses: int
    bytes_fetched: int
    slots: int
    resident: int
    total_experts: int
    new_tokens: int
    seconds: float
    cpu_experts: int = 0
    prefetched: int = 0

    @property
    def hit_rate(self) -> float:
        return hit_rate(self.hits, self.misses, self.cpu_experts)

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        speed = f"{self.new_tokens} tokens in {self.seconds:.2f} s, {self.tokens_per_second:.1f} tokens/s"
        if not self.total_experts:
            return f"a dense model, all of it resident; {speed}"
        on_cpu = f", {self.cpu_experts} computed by the CPU" if self.cpu_experts else ""
        ahead = f", {self.prefetched} experts ahead" if self.prefetched else ""
        return (
            f"experts: {self.hits} hits, {self.misses} misses{on_cpu} ({self.hit_rate:.1%} hits), "
            f"{self.bytes_fetched / 1e6:.1f} MB fetched{ahead}, {self.resident}/{self.total_experts} resident; {speed}"
        )


@dataclass
class EngineCounts:
    """Totals since the engine was made.

    Attributes:
        steps, passes: a step makes one pass, and one more for each adapter in it that cannot share it.
        rows: tokens that went through the model.
        reused: tokens of prompts that did not have to.
        seconds: wall time of all steps.
    """

    steps: int = 0
    passes: int = 0
    rows: int = 0
    new_tokens: int = 0
    reused: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Load:
    """What an engine has in hand: requests that wait, requests that run, blocks of the cache, blocks in use."""

    waiting: int
    running: int
    blocks: int
    used: int
