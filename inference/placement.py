"""What of a model lies on the GPU and what in host memory, from its folder alone. No torch here.

Files' headers give every tensor's shape, ``config.json`` the rest; no weight is read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from inference.costmodel import BYTES, PACKED_BYTES
from inference.errors import InferenceError
from inference.packed_block import PackedBlock, whole_groups
from inference.shards import read_header, shard_names
from moe.family_table import FAMILIES, known_families
from moe.quantised import quantisation

WORKSPACE = 512 << 20  # of a GPU: CUDA's own context, activations and buffers
RING_BYTES = 64 << 20  # of a GPU's buffers for packed experts that have arrived; more where two of them are more
# Room for keys and values where none is asked for: so many tokens, or as many as this share of the memory holds.
KV_TOKENS, KV_SHARE = 32768, 0.25
_UNITS = {"B": 1} | {f"{letter}{kind}": base**power
          for kind, base in (("iB", 1024), ("B", 1000)) for power, letter in enumerate("KMGT", 1)}  # fmt: skip


class PlacementError(InferenceError):
    """A folder that is no mixture of experts, or a budget that it does not fit: what, and what would fit."""


def parse_size(text: str) -> int:
    """Bytes of ``8GiB``, ``800MB`` or ``1000000``. Raises PlacementError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([A-Za-z]*)\s*", text)
    units = {unit.lower(): size for unit, size in _UNITS.items()}
    unit = match[2].lower() or "b" if match else ""
    if match is None or unit not in units or not 0 < float(match[1]) * units[unit] < 2**63:
        raise PlacementError(f"{text!r} is not a size; write it as 8GiB, 800MB or a number of bytes")
    return int(float(match[1]) * units[unit])


def show_size(nbytes: float) -> str:
    """In decimal units with three digits, as link rates are given."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.3g} {unit}" if nbytes < 1e3 * size else f"{nbytes / size:.0f} {unit}"
    return f"{nbytes:.0f} B"


@dataclass(frozen=True)
class ModelSizes:
    """A mixture of experts in numbers.

    Attributes:
        dtype: that it is computed in.
        layers, moe_layers: of the whole model, and those with routed experts.
        experts, top_k: of one layer, and of one token.
        hidden, intermediate: of one expert.
        expert_bytes: of one routed expert.
        dense_bytes: of everything else, in ``dtype``.
        table_bytes: the part of it that is only looked up: an embedding that is not the output's, too.
        kv_bytes: of one token's keys and values in all layers.
        packed: experts are packed in host memory (:mod:`inference.packed`).
    """

    family: str
    dtype: str
    layers: int
    moe_layers: int
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    expert_bytes: int
    dense_bytes: int
    table_bytes: int
    kv_bytes: int
    packed: bool = False

    @property
    def itemsize(self) -> int:
        return BYTES[self.dtype]

    def kept(self, *, pack: bool) -> ModelSizes:
        """As the runtime keeps experts in host memory: if ``pack``, packed where every row is whole groups."""
        packable = self.dtype == "bfloat16" and whole_groups(self.hidden, self.intermediate)
        return replace(self, packed=pack and packable)

    @property
    def host_itemsize(self) -> float:
        """Of an expert's weight in host memory."""
        return PACKED_BYTES if self.packed else self.itemsize

    @property
    def host_expert_bytes(self) -> int:
        """Of one expert as it is read from host memory, and crosses the link."""
        return int(self.expert_bytes / self.itemsize * self.host_itemsize)

    @property
    def bank_expert_bytes(self) -> int:
        """That one expert has in host memory: packed ones have room for as many exceptions as one may have."""
        return PackedBlock(self.expert_bytes // self.itemsize).stride if self.packed else self.expert_bytes

    @property
    def total_experts(self) -> int:
        return self.moe_layers * self.experts

    @property
    def dense_elements(self) -> float:
        """That each token is multiplied by."""
        return (self.dense_bytes - self.table_bytes) / self.itemsize


def model_sizes(folder: str | Path, dtype: str | None = None) -> ModelSizes:
    """Raises InferenceError for a folder that cannot be read, or is not a mixture of experts of a known family."""
    folder = Path(folder)
    config = _json(folder / "config.json")
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        raise PlacementError(
            f"{folder}: model_type {kind!r} has no routed experts that the runtime knows; it serves {known_families()}"
        )
    if why := quantisation(folder, config):
        raise PlacementError(why)
    number = _Numbers(folder, config)
    shapes = _loaded(tensor_shapes(folder), number("num_hidden_layers"))
    routed = {name: shape for name, shape in shapes.items() if ".experts." in name}
    layers = {match[1] for name in routed if (match := re.search(r"\.layers\.(\d+)\.", name))}
    if not layers:
        raise PlacementError(f"{folder}: no tensor of a routed expert in its safetensors; export the model again")
    dtype = dtype or str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if dtype not in BYTES:
        raise PlacementError(
            f"{folder}: precision {dtype!r} is not served; save the model in one of {', '.join(BYTES)}"
        )
    itemsize, hidden = BYTES[dtype], number("hidden_size")
    experts = _experts(routed)
    each = len(layers) * experts
    weights = sum(math.prod(shape) for name, shape in routed.items() if not name.endswith("bias")) // each
    dense = sum(math.prod(shape) for name, shape in shapes.items() if name not in routed)
    table = math.prod(shapes.get("model.embed_tokens.weight", (0,))) if "lm_head.weight" in shapes else 0
    return ModelSizes(
        family=kind,
        dtype=dtype,
        layers=number("num_hidden_layers"),
        moe_layers=len(layers),
        experts=experts,
        top_k=number("num_experts_per_tok", "experts_per_token"),
        hidden=hidden,
        intermediate=weights // (3 * hidden),
        expert_bytes=sum(map(math.prod, routed.values())) // each * itemsize,
        dense_bytes=dense * itemsize,
        table_bytes=table * itemsize,
        kv_bytes=_kv_numbers(number) * itemsize,
    )


def _loaded(shapes: Mapping[str, tuple[int, ...]], layers: int) -> dict[str, tuple[int, ...]]:
    """Without layers past the last, which predict further tokens (DeepSeek-V3) and are not served."""
    found = {name: re.search(r"\.layers\.(\d+)\.", name) for name in shapes}
    return {name: shapes[name] for name, match in found.items() if match is None or int(match[1]) < layers}


def _experts(routed: Mapping[str, tuple[int, ...]]) -> int:
    """Of a layer: files have a tensor for each, or one that stacks all."""
    single = [int(match[1]) for name in routed if (match := re.search(r"\.experts\.(\d+)\.", name))]
    return max(single) + 1 if single else max(shape[0] for shape in routed.values())


@dataclass(frozen=True)
class _Numbers:
    """Whole numbers of a configuration, whose fields have had more than one name."""

    folder: Path
    config: Mapping[str, Any]

    def __call__(self, *names: str) -> int:
        value = self.get(*names)
        if value is None:
            raise PlacementError(f"{self.folder / 'config.json'}: no number {names[0]!r}; copy the folder again")
        return value

    def get(self, *names: str) -> int | None:
        found = (self.config.get(name) for name in names)
        return next((value for value in found if isinstance(value, int) and value > 0), None)


def _kv_numbers(number: _Numbers) -> int:
    """That one token leaves in the cache; with latent attention the latent and the rotated key, for all heads once."""
    layers = number("num_hidden_layers")
    if (latent := number.get("kv_lora_rank")) is not None:
        return layers * (latent + number("qk_rope_head_dim"))
    heads = number("num_attention_heads")
    width = number.get("head_dim") or number("hidden_size") // heads
    return 2 * layers * (number.get("num_key_value_heads") or heads) * width


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Of all tensors in the folder's safetensors, from the headers. Raises InferenceError."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in shard_names(folder):
        try:
            with (folder / file).open("rb") as opened:
                header, _ = read_header(opened)
            shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError) as error:
            raise PlacementError(f"{folder / file}: not a safetensors file ({error}); copy the folder again") from error
    return shapes


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise PlacementError(
            f"{path}: cannot be read ({error}); give a folder as `planaria export` writes it"
        ) from error
    if not isinstance(found, dict):
        raise PlacementError(f"{path}: not a JSON object; copy the folder again")
    return found


@dataclass(frozen=True)
class Placement:
    """What goes where.

    Attributes:
        slots: resident routed experts.
        kv_tokens: for how many tokens keys and values have room, all sequences together.
        workspace: bytes kept free for what else a GPU needs.
        ring: bytes of buffers for packed experts that have arrived.
        streamed: experts that pass through two buffers of a whole layer each while prompts are read; 0 where nothing
            has to.
        vram: bytes that were given, or None.
    """

    sizes: ModelSizes
    slots: int
    kv_tokens: int
    workspace: int
    ring: int
    streamed: int
    vram: int | None = None

    @property
    def share(self) -> float:
        return self.slots / self.sizes.total_experts

    @property
    def slot_bytes(self) -> int:
        """Of all slots; without any, one is for passing through."""
        return max(self.slots, 1) * self.sizes.expert_bytes

    @property
    def kv_bytes(self) -> int:
        return self.kv_tokens * self.sizes.kv_bytes

    @property
    def streamed_bytes(self) -> int:
        return self.streamed * self.sizes.expert_bytes

    @property
    def banked(self) -> bool:
        """With all experts in slots nothing is fetched twice, and none is kept elsewhere."""
        return self.slots < self.sizes.total_experts

    @property
    def nbytes(self) -> int:
        """In all, on the GPU or, without one, in host memory."""
        room = self.workspace + self.ring + self.streamed_bytes
        return self.sizes.dense_bytes + self.kv_bytes + self.slot_bytes + room


def place(
    sizes: ModelSizes,
    *,
    gpu: bool,
    kv_tokens: int | None = None,
    vram: int | None = None,
    expert_budget: float | None = None,
) -> Placement:
    """From a size or a share of experts: one of them, or neither for all experts.

    Args:
        gpu: there is a link to cross, so :data:`WORKSPACE` is kept free, and prompts stream through buffers.
        kv_tokens: None for :data:`KV_TOKENS`, or what :data:`KV_SHARE` of ``vram`` holds if that is less.

    Raises PlacementError if ``vram`` does not even hold the dense part, keys and values, buffers and one expert.
    """
    assert vram is None or expert_budget is None
    workspace, buffers = (WORKSPACE, 2 * sizes.experts) if gpu else (0, 0)
    ring = max(RING_BYTES, 2 * sizes.expert_bytes) if gpu and sizes.packed else 0
    if kv_tokens is None:
        kv_tokens = KV_TOKENS if vram is None else min(KV_TOKENS, int(KV_SHARE * vram) // sizes.kv_bytes)
    if vram is None:
        share = 1.0 if expert_budget is None else expert_budget
        slots = max(round(share * sizes.total_experts), 1) if share else 0
        some = slots < sizes.total_experts
        return Placement(sizes, slots, kv_tokens, workspace, ring * some, buffers * some)
    used = sizes.dense_bytes + kv_tokens * sizes.kv_bytes + workspace
    if used + sizes.total_experts * sizes.expert_bytes <= vram:
        return Placement(sizes, sizes.total_experts, kv_tokens, workspace, 0, 0, vram)
    placed = Placement(sizes, 1, kv_tokens, workspace, ring, buffers, vram)
    if placed.nbytes > vram:
        raise PlacementError(_refusal(placed, vram))
    return replace(placed, slots=1 + (vram - placed.nbytes) // sizes.expert_bytes)


def _refusal(placed: Placement, vram: int) -> str:
    sizes = placed.sizes
    parts = [
        f"its dense part takes {show_size(sizes.dense_bytes)}",
        f"keys and values of {placed.kv_tokens} tokens {show_size(placed.kv_bytes)}",
    ]
    if placed.workspace:
        parts.append(f"workspace {show_size(placed.workspace)}")
    if placed.ring:
        parts.append(f"a ring for packed experts {show_size(placed.ring)}")
    if placed.streamed:
        parts.append(f"two layers that prompts stream through {show_size(placed.streamed_bytes)}")
    return (
        f"{show_size(vram)} do not hold this model: {', '.join(parts)} and one expert {show_size(sizes.expert_bytes)}; "
        f"give at least {math.ceil(placed.nbytes / 1e6)}MB, or fewer kv_tokens"
    )
