"""Where a run stands: the part of its state that is neither weights nor random streams."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Progress:
    """Restored exactly from a checkpoint.

    Attributes:
        step: optimizer steps completed.
        samples: the global data cursor: samples consumed by all ranks.
        consumed: running SHA-256 over the samples this rank consumed, ids and tokens, in order.
        optimizer_steps: the inner optimizer's own step count per parameter group.
        tenants: by name, steps without a gradient that is a number (``bad``, ``bad_in_row``), and the step at which it
            stopped for that, or 0.
    """

    step: int = 0
    samples: int = 0
    consumed: str = ""
    optimizer_steps: list[float] = field(default_factory=list)
    tenants: dict[str, dict[str, int]] = field(default_factory=dict)

    def consume(self, sample_ids: Sequence[int], tokens: bytes) -> None:
        """Chain the next micro-batch onto ``consumed``: a repeated, skipped or altered sample changes it for good."""
        chain = hashlib.sha256(self.consumed.encode())
        chain.update(json.dumps(list(sample_ids)).encode())
        chain.update(tokens)
        self.consumed = chain.hexdigest()

    def dump(self) -> bytes:
        return json.dumps(self.__dict__, sort_keys=True).encode()

    def load(self, blob: bytes) -> None:
        for name, value in json.loads(blob).items():
            setattr(self, name, value)
