"""Under which conditions a checkpoint's bits came about: what the recipe does not say, yet decides the run.

The same recipe on edited text, on another base model, device or torch is another run. Its checkpoints say where they
come from, and a resume that would mix the two is refused instead of going on in silence.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist

from moe.fingerprint import fingerprint
from trainer.build import training_dtype
from trainer.recipe import recipe_fingerprint
from trainer.rendezvous import Process
from trainer.schema import Recipe


class OriginError(ValueError):
    """A checkpoint of this run folder was written under other conditions; the message lists them."""


@dataclass(frozen=True)
class Origin:
    """All fields are compared. ``data`` names the tokenised text, ``base`` the frozen weights ("" if none)."""

    recipe: str
    data: str
    base: str
    world: int
    ep: int
    zero: int
    device: str
    dtype: str
    optimizer: str
    torch: str

    @classmethod
    def of(cls, recipe: Recipe, process: Process, data_key: str, inner: torch.optim.Optimizer) -> Origin:
        """A collective: rank 0 reads the base model once for all."""
        base = [fingerprint(recipe.model.path) if process.rank == 0 and recipe.model.path else ""]
        dist.broadcast_object_list(base, src=0)
        return cls(
            recipe=recipe_fingerprint(recipe),
            data=data_key,
            base=base[0],
            world=process.world,
            ep=recipe.parallel.ep,
            zero=recipe.parallel.zero,
            device=process.device.type,
            dtype=str(training_dtype(recipe, process.device)).removeprefix("torch."),
            optimizer=f"{type(inner).__name__}(fused={bool(inner.defaults.get('fused'))})",
            torch=torch.__version__,
        )

    def dump(self) -> bytes:
        return json.dumps(vars(self)).encode()

    def check(self, stored: bytes) -> None:
        """Raises OriginError naming every condition that changed since ``stored`` was written."""
        before = json.loads(stored)
        changed = [
            f"  {field.name}: was {before.get(field.name)!r}, is {getattr(self, field.name)!r}"
            for field in fields(self)
            if before.get(field.name) != getattr(self, field.name)
        ]
        if changed:
            listed = "\n".join(changed)
            raise OriginError(
                f"this run was begun under other conditions, and going on would change its bits:\n{listed}\n"
                "restore them, or give log.run=NAME for a new run"
            )
