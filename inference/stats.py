"""What the runtime made and what it took, as values. No torch here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Generation:
    """What one prompt led to.

    Attributes:
        text: the new tokens decoded; empty without a tokenizer.
        token_ids: the new tokens, an end-of-sequence token included.
        prompt_ids: the prompt as the model saw it.
        finish: ``eos``, ``stop`` or ``length``, see :class:`inference.requests.Output`.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_ids: tuple[int, ...]
    finish: str


@dataclass(frozen=True)
class Stats:
    """Totals since the model was opened. Seconds are wall time of the engine's steps, prompts included."""

    hits: int
    misses: int
    bytes_fetched: int
    slots: int
    resident: int
    total_experts: int
    new_tokens: int
    seconds: float

    @property
    def hit_rate(self) -> float:
        return self.hits / max(self.hits + self.misses, 1)

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        speed = f"{self.new_tokens} tokens in {self.seconds:.2f} s, {self.tokens_per_second:.1f} tokens/s"
        if not self.total_experts:
            return f"a dense model, all of it resident; {speed}"
        return (
            f"experts: {self.hits} hits, {self.misses} misses ({self.hit_rate:.1%} hits), "
            f"{self.bytes_fetched / 1e6:.1f} MB fetched, {self.resident}/{self.total_experts} resident; {speed}"
        )


@dataclass
class EngineCounts:
    """Totals since the engine was made.

    Attributes:
        steps, passes: a step makes one pass for each adapter in it.
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
