"""Which bank an adapter's tensor belongs to (no torch here).

Banks are put where :func:`lora.targets.resolve` finds places for them, and the same answer is given here. Where the
model's places do not tell, the kind of site is read off the tensors' names; what that leaves open is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lora.config import BankConfig
from lora.errors import AdapterError
from lora.methods import EXPERT_TENSORS, FFN
from lora.presets import expand, matches
from lora.targets import Places, resolve


def owners_of(paths: Iterable[str], banks: Mapping[str, BankConfig], places: Places | None = None) -> dict[str, str]:
    """Name of the bank of each adapter tensor, by the tensor's path.

    Args:
        paths: of all tensors of the adapter: those of one place tell together what it is.
        places: of the model that the banks were attached to, if it is at hand.
    Raises AdapterError for a tensor that no bank can have and, without ``places``, for one that several could.

    >>> banks = {"all": BankConfig("lora", ("layers.*",)), "e": BankConfig("expert-lora")}
    >>> owners_of(["model.layers.3.mlp.experts.adapter.down_proj.A", "model.layers.3.mlp.up_proj.adapter.A"], banks)
    {'model.layers.3.mlp.experts.adapter.down_proj.A': 'e', 'model.layers.3.mlp.up_proj.adapter.A': 'all'}
    """
    paths = list(paths)
    placed = {} if places is None else {one.path: one.bank for one in resolve(banks, places)}
    inside: dict[str, set[str]] = {}
    for path in paths:
        place, head = _split(path)
        inside.setdefault(place, set()).add(head)
    owners = {}
    for path in paths:
        place, head = _split(path)
        owners[path] = placed.get(f"{place}.{head}") or placed.get(place) or _by_name(path, banks, inside)
    return owners


def _by_name(path: str, banks: Mapping[str, BankConfig], inside: Mapping[str, set[str]]) -> str:
    place, head = _split(path)
    sites = _sites(place, inside[place])
    named = f"{place}.{head}" if "experts" in sites else place
    found = [
        name
        for name, bank in banks.items()
        if place and (full := expand(bank)).site in sites and any(matches(target, named) for target in full.targets)
    ]
    if not found:
        raise AdapterError(f"{path} belongs to none of the banks {', '.join(banks)}")
    if len(found) > 1:
        raise AdapterError(
            f"{path} could belong to adapter.{found[0]} or adapter.{found[1]}; give the places of the model that the "
            "banks are on, or narrow their targets"
        )
    return found[0]


def _sites(place: str, heads: set[str]) -> tuple[str, ...]:
    """What a place can be, from the names of all that is inside its adapter."""
    if place.endswith(".experts") and heads & set(EXPERT_TENSORS):
        return ("experts",)
    return ("ffn",) if heads & set(FFN) else ("linear", "parallel")


def _split(path: str) -> tuple[str, str]:
    """The adapted module, and the first part of the name inside its adapter."""
    place, _, inner = path.rpartition(".adapter.")
    return place, inner.partition(".")[0]
