"""Which places of a model the targets of banks name (no torch here).

A model is described by :class:`Places`, read off its modules (:mod:`lora.attach`) or off the names and shapes of its
tensors (the plan). Both give the same answer to the same banks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from lora.config import BankConfig
from lora.errors import AdapterError
from lora.presets import expand, layer_of, matches

_WHAT = {
    "linear": "linear layer",
    "experts": "tensor of routed experts",
    "ffn": "dense feed-forward block",
    "parallel": "MoE block",
}
OUTPUT, ROUTER = "the output layer is in no layer of the model", "routers choose experts and stay as they are"


@dataclass(frozen=True)
class Places:
    """Module paths by site; of experts, the paths of their stacked tensors.

    Attributes:
        refused: linear layers that no bank may have, and why.
    """

    linear: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    ffn: tuple[str, ...] = ()
    parallel: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)

    def of(self, site: str) -> tuple[str, ...]:
        found: tuple[str, ...] = getattr(self, site)
        return found


@dataclass(frozen=True)
class Placed:
    """One place that a bank's target names."""

    bank: str
    target: str
    site: str
    path: str

    @property
    def layer(self) -> int:
        return layer_of(self.path)

    @property
    def host(self) -> str:
        """Path of the module that gets the adapter: experts, where ``path`` is one of their tensors."""
        return self.path.rpartition(".")[0] if self.site == "experts" else self.path


def resolve(banks: Mapping[str, BankConfig], places: Places) -> tuple[Placed, ...]:
    """Every place that the banks are put on, in the order of banks, targets and ``places``.

    Raises AdapterError for a target that matches nothing (naming what is there) or something that no bank may have, for
    a place that two targets name, and for a layer whose modules are fewer than what a prompt should choose of them.
    """
    found = [placed for name, bank in banks.items() for placed in _of_bank(name, expand(bank), places)]
    owners: dict[tuple[str, str], Placed] = {}
    for placed in found:
        other = owners.setdefault((placed.site, placed.path), placed)
        if other is not placed:
            raise AdapterError(
                f"adapter.{placed.bank}: {placed.target!r} names {placed.path}, which already belongs to "
                f"adapter.{other.bank} ({other.target!r}); give each place to one target of one bank"
            )
    _check_nested(found)
    _check_prompted(found, banks)
    return tuple(found)


def _of_bank(name: str, full: BankConfig, places: Places) -> Iterator[Placed]:
    site = str(full.site)
    there = places.of(site)
    for target in full.targets:
        bad = [path for path in places.refused if matches(target, path)] if site == "linear" else []
        found = [path for path in there if matches(target, path)]
        # A wildcard leaves routers alone; whoever writes one's name means it.
        if bad and (not found or places.refused[bad[0]] != ROUTER):
            raise AdapterError(f"adapter.{name}: target {target!r} {_refusal(bad[0], found, places)}")
        if not found:
            raise AdapterError(
                f"adapter.{name}: target {target!r} matches no {_WHAT[site]}; the model has: "
                f"{_last_names(there) or f'no {_WHAT[site]} at all'}{_elsewhere(target, site, places)}"
            )
        yield from (Placed(name, target, site, path) for path in found)


def _refusal(bad: str, found: list[str], places: Places) -> str:
    why = f"{bad}, and {places.refused[bad]}"
    if found:
        return f"also names {why}; narrow it, e.g. to 'layers.*.{found[0].rpartition('.')[2]}'"
    return f"names {why}; the model has the linear layers {_last_names(places.linear)}"


def _last_names(paths: tuple[str, ...]) -> str:
    return ", ".join(sorted({path.rpartition(".")[2] for path in paths}))


def _elsewhere(target: str, site: str, places: Places) -> str:
    """What the target would name with another site."""
    other = next((s for s in _WHAT if s != site and any(matches(target, path) for path in places.of(s))), None)
    return f" ({target!r} names a {_WHAT[other]}, which is for presets of site: {other})" if other else ""


def _check_nested(found: list[Placed]) -> None:
    """A feed-forward bank runs the block's linear layers itself; adapters on these would never be called."""
    blocks = {placed.path: placed for placed in found if placed.site == "ffn"}
    for placed in found:
        if placed.site == "linear" and (outer := blocks.get(placed.path.rpartition(".")[0])) is not None:
            raise AdapterError(
                f"adapter.{placed.bank}: {placed.path} is inside {outer.path}, which adapter.{outer.bank} runs as a "
                f"whole; leave {placed.target!r} out of one of them"
            )


def _check_prompted(found: list[Placed], banks: Mapping[str, BankConfig]) -> None:
    """Where a prompt chooses among a layer's modules, there have to be as many."""
    counts: dict[tuple[str, int], int] = {}
    for placed in found:
        if expand(banks[placed.bank]).router == "prompt":
            counts[placed.bank, placed.layer] = counts.get((placed.bank, placed.layer), 0) + 1
    for (name, layer), count in counts.items():
        full = expand(banks[name])
        wanted = max(2, full.top_k or 1) if full.combine == "top_k" else 2
        if count < wanted:
            raise AdapterError(
                f"adapter.{name}: router: prompt chooses among {wanted} or more modules of a layer, and its targets "
                f"name {count} in layer {layer}; add targets{', or lower top_k' if wanted > 2 else ''}"
            )
