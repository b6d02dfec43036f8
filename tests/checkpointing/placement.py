"""Where ZeRO puts the experts' state, and how evenly a selection of them loads the ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from checkpointing.partial import Experts
from checkpointing.units import Range, expert_of
from moe.refs import ExpertRef

GROUP_ELEMENTS = 178_956_971  # DeepSpeed's limit of one parameter group


def bytes_per_rank(
    chosen: Iterable[ExpertRef], placement: Mapping[int, Iterable[Range]], element_bytes: int = 4
) -> dict[int, int]:
    """Bytes of the chosen experts on each rank.

    Args:
        placement: the ranges of every kind that lie on each rank.
    """
    wanted = set(chosen)
    return {
        rank: sum(r.size for r in ranges if expert_of(r.unit) in wanted) * element_bytes
        for rank, ranges in placement.items()
    }


def imbalance(loads: Iterable[int]) -> float:
    """The largest over the mean; 1.0 is balanced."""
    loads = list(loads)
    return max(loads) * len(loads) / sum(loads) if any(loads) else 1.0


def zero_placement(
    experts: Experts, tensors: Mapping[str, int], kind: str = "master", group_elements: int = GROUP_ELEMENTS
) -> dict[int, list[Range]]:
    """Where ZeRO puts the experts' state, one kind of it: rank -> ranges.

    Each EP rank's stacked tensors, in layer order, are filled into groups of at most ``group_elements`` (a larger
    tensor is a group of its own); each group is flattened and cut into ``replicas`` equal parts. The part's number x ep
    + EP rank is the rank, as in ``moe.layout``.

    Args:
        tensors: elements of each tensor of one expert, in the order of the model's parameters.
    """
    block = experts.count // experts.ep
    groups: list[list[tuple[int, str, int]]] = []
    room = 0
    for layer in experts.layers:
        for name, size in tensors.items():
            if not groups or size * block > room:
                groups.append([])
                room = group_elements
            groups[-1].append((layer, name, size))
            room -= size * block
    placement: dict[int, list[Range]] = {rank: [] for rank in range(experts.ep * experts.replicas)}
    for ep_rank in range(experts.ep):
        for group in groups:
            for replica, piece in _cut(group, range(ep_rank * block, (ep_rank + 1) * block), experts.replicas, kind):
                placement[replica * experts.ep + ep_rank].append(piece)
    return placement


def _cut(group: list[tuple[int, str, int]], local: range, replicas: int, kind: str) -> Iterable[tuple[int, Range]]:
    """(replica, range) of the ``local`` experts in one flattened group of (layer, tensor, elements of one expert)."""
    part = -(-sum(size for _, _, size in group) * len(local) // replicas)
    at = 0
    for layer, name, size in group:
        for expert in local:
            unit = f"{ExpertRef(layer, expert)}.{name}"
            for replica in range(at // part, (at + size - 1) // part + 1):
                lo, hi = max(at, replica * part), min(at + size, (replica + 1) * part)
                yield replica, Range(unit, kind, lo - at, hi - at)
            at += size
