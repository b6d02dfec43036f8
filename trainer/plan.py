"""What a recipe will train and how much memory that takes, before anything runs (no torch here).

Counts come from tensor shapes: of a new model by the family's own formulas, of a folder from the headers of
its safetensors files.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from checkpointing.moments import state_width
from lora.config import BankConfig
from lora.cost import Parameters, parameters
from lora.errors import AdapterError
from moe.family_table import BUFFERS, DENSE, FAMILIES, known_families
from trainer import tenant_recipe
from trainer.admission import Admission, admit
from trainer.dense_rules import dense_problem, is_dense
from trainer.esft_file import SelectionError, read_selection
from trainer.family_shapes import family_shapes
from trainer.mode_plan import Share
from trainer.model_shapes import model_shapes
from trainer.schema import Recipe
from trainer.variant_shapes import mtp_shapes, soft_shapes

Shapes = Mapping[str, tuple[int, ...]]

KINDS = ("embeddings", "attention", "norms", "router", "shared experts", "experts", "dense", "other")
_EXPERT = re.compile(r"\.experts\.")
_SLOT_GENERATIONS = 3  # two sealed records and one being written
_DISK_GENERATIONS = 2  # without a memory tier: one being written to disk, one for the next capture


class PlanError(ValueError):
    """The model folder does not fit the recipe; the message names file and key."""


@dataclass(frozen=True)
class Plan:
    """Figures of one run.

    Attributes:
        total: parameters of the model by kind, whole, without adapters.
        trained: parameters that train by kind (adapters, when there are any).
        active: parameters that one token uses.
        weight_bytes, gradient_bytes, optimizer_bytes: per worker.
        snapshot_bytes: the keeper's memory per worker: 12 bytes per parameter of the partition and
            generation, 8 with an optimizer of one moment.
        generations: how many; without a memory tier the disk tier still needs some to write from.
        share: what a worker captures, and what the modes' costs depend on.
    """

    total: Mapping[str, int]
    trained: Mapping[str, int]
    active: int
    experts_per_worker: int
    num_layers: int
    tokens_per_step: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    snapshot_bytes: int
    generations: int
    share: Share


def folder_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Hugging Face folder's parameters, from safetensors headers alone. Raises PlanError."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise PlanError(f"model.path: {folder} holds no model*.safetensors; export a model there first")
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        try:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                if size > path.stat().st_size:
                    raise ValueError("its header is cut short")
                header = json.loads(file.read(size))
            shapes |= {
                name: tuple(entry["shape"])
                for name, entry in header.items()
                if name != "__metadata__" and not name.endswith(BUFFERS)
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"model.path: {path} is not a safetensors file ({error}); export it again") from error
    return shapes


def kind_of(name: str) -> str:
    """The kind of parameter that a Hugging Face path names, one of KINDS."""
    for kind, pattern in _KIND_PATTERNS:
        if re.search(pattern, name):
            return kind
    return "other"


_KIND_PATTERNS = (
    ("experts", r"\.experts\."),
    ("shared experts", r"\.shared_experts?[._]"),
    ("norms", r"norm"),
    ("router", r"\.(gate|router)\.[a-z_]+$|\.(gate|router)\.weight$"),
    ("embeddings", r"embed_tokens|lm_head"),
    ("attention", r"\.(self_attn|attention|attn)\."),
    ("dense", r"\.mlp\."),
)


def count_by_kind(shapes: Shapes) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for name, shape in shapes.items():
        counts[kind_of(name)] += prod(shape)
    return {kind: counts[kind] for kind in KINDS if counts[kind]}


def bank_parameters(banks: Mapping[str, BankConfig], shapes: Shapes, active: int) -> dict[str, Parameters]:
    """What trains of each bank on a model with these tensors and ``active`` routed experts a token, all counted.

    Raises PlanError for banks that this model cannot carry.
    """
    found = dict.fromkeys(banks, Parameters(0, 0))
    try:
        for placed, here, size in model_shapes(shapes, active).resolve(banks):
            here_found = parameters(here, size, placed.path.rpartition(".")[2])
            before = found[placed.bank]
            of_experts, shared = before.of_experts + here_found.of_experts, before.shared + here_found.shared
            found[placed.bank] = Parameters(of_experts, shared, before.frozen + here_found.frozen)
    except AdapterError as error:
        raise PlanError(str(error)) from None
    return found


def plan_run(recipe: Recipe) -> Plan:
    """Raises PlanError if ``model.path`` cannot be read or does not fit the recipe."""
    shapes, experts, own = base_of(recipe)
    top_k = recipe.routing.choices(own)
    shapes = {**soft_shapes(shapes, recipe.model.soft), **mtp_shapes(shapes, recipe.train.mtp.depth)}
    if recipe.model.soft.kind != "none":
        top_k = experts  # a token takes part in all
    total = count_by_kind(shapes)
    layers, moe_layers = _layers(shapes), _layers(name for name in shapes if _EXPERT.search(name))
    banks = bank_parameters(recipe.adapter, shapes, own)
    expert_total = total.get("experts", 0)
    copies = max(1, len(recipe.tenants))
    trained = {f"adapter.{name}": copies * count.total for name, count in banks.items()} or total
    frozen = recipe.model.frozen_experts
    if frozen > experts:
        raise PlanError(f"model.frozen_experts={frozen} is more than the {experts} experts of {recipe.model.path}")
    if frozen:
        kept = {"experts": expert_total * (experts - frozen) // experts}
        trained = {"router": total["router"], **{kind: count for kind, count in kept.items() if count}}
    if recipe.model.trainable_experts is not None:
        trained = {"experts": _chosen(recipe.model.trainable_experts, experts, shapes, expert_total, moe_layers)}
    expert_trained = copies * sum(bank.of_experts for bank in banks.values()) if banks else trained.get("experts", 0)
    workers, ep = recipe.parallel.workers, recipe.parallel.ep
    width = number_width(recipe)
    everything, training = sum(total.values()), sum(trained.values())
    added = training if banks else 0
    added += sum(bank.frozen for bank in banks.values())
    local_weights = everything - expert_total + added - (expert_trained if banks else 0)
    local_weights += (expert_total + (expert_trained if banks else 0)) // ep
    local_trained = training - expert_trained + expert_trained // ep
    # Dense parameters are partitioned over all workers, experts over the workers that hold the same ones:
    # of ep=2 and 4 workers each holds 1/2 of the experts, cut in 4/2 parts. Both come to 1/workers.
    partition = -(-training // workers)
    generations = _generations(recipe)
    active = everything - expert_total + (expert_total * top_k // experts if experts else 0)
    _check_pec(recipe, experts)
    return Plan(
        total=total,
        trained=trained,
        active=active,
        experts_per_worker=experts // ep,
        num_layers=layers,
        tokens_per_step=sum(tenant_recipe.batch_sizes(recipe)) * recipe.data.sequence_length,
        weight_bytes=local_weights * width,
        gradient_bytes=(local_trained if recipe.parallel.zero == 1 else partition) * width,
        optimizer_bytes=partition * state_width(recipe.train.optimizer),
        snapshot_bytes=partition * state_width(recipe.train.optimizer) * generations,
        generations=generations,
        share=Share(partition, -(-expert_trained // workers), experts, moe_layers, active, top_k),
    )


def _chosen(path: str, experts: int, shapes: Shapes, numbers: int, moe_layers: int) -> int:
    """Numbers of the experts that the file chooses. Raises PlanError for those that the model does not have."""
    try:
        chosen = read_selection(path)
    except SelectionError as error:
        raise PlanError(str(error)) from None
    there = {int(match[1]) for name in shapes if (match := re.search(r"layers\.(\d+)\..*\.experts\.", name))}
    for layer, found in chosen.items():
        if layer not in there or max(found, default=0) >= experts:
            raise PlanError(
                f"model.trainable_experts: {path} names experts {list(found)} of layer {layer}; the model has "
                f"{experts} in each of its layers {min(there, default=0)} to {max(there, default=0)}; select again"
            )
    return numbers // (experts * moe_layers) * sum(len(set(found)) for found in chosen.values())


def _layers(names: Iterable[str]) -> int:
    return len({match[0] for name in names if (match := re.match(r"(.*layers|mtp)\.\d+\.", name))})


def _check_pec(recipe: Recipe, experts: int) -> None:
    """What the recipe alone cannot say: whether a folder's model has as many experts as ``pec`` counts."""
    checkpoint = recipe.checkpoint
    if checkpoint.mode != "pec":
        return
    for name, count in (("k_snapshot", checkpoint.pec.k_snapshot), ("k_persist", checkpoint.pec.k_persist)):
        if count != "auto" and count > experts:
            raise PlanError(
                f"checkpoint.pec.{name}={count} is more than the {experts} experts of {recipe.model.path}; choose at "
                "most that"
            )


def _generations(recipe: Recipe) -> int:
    memory, disk = recipe.checkpoint.memory, recipe.checkpoint.disk
    if memory.enabled:
        return _SLOT_GENERATIONS + (1 if disk.every else 0)
    return _DISK_GENERATIONS if disk.every or disk.final else 0


def number_width(recipe: Recipe) -> int:
    """Bytes of a number in the training dtype."""
    return 2 if recipe.parallel.dtype == "bf16" or auto_is_bf16(recipe) else 4


def auto_is_bf16(recipe: Recipe) -> bool:
    return recipe.parallel.dtype == "auto" and recipe.parallel.device == "cuda"


def base_of(recipe: Recipe) -> tuple[Shapes, int, int]:
    """Shapes, routed experts per layer and experts per token of the model to train. Raises PlanError."""
    model = recipe.model
    if model.path is None:
        return (
            family_shapes(model, recipe.data.tokenizer.vocab_size),
            model.num_experts,
            model.num_experts_per_tok,
        )
    folder = Path(model.path)
    try:
        config = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise PlanError(
            f"model.path: no {folder / 'config.json'}; make that folder first (planaria export RUN OUT) or "
            "start where the path begins"
        ) from None
    except (OSError, ValueError) as error:
        raise PlanError(f"model.path: {folder / 'config.json'} cannot be read ({error}); export again") from error
    config = config.get("text_config", config) if isinstance(config, dict) else {}
    if (kind := config.get("model_type")) is not None and kind not in FAMILIES and not is_dense(kind):
        raise PlanError(
            f"model.path: {folder / 'config.json'} is of model_type {kind!r}; planaria trains {known_families()}, and "
            f"adapters on {', '.join(DENSE)}"
        )
    if isinstance(kind, str) and is_dense(kind) and (problem := dense_problem(recipe, kind)):
        raise PlanError(problem)

    def number(*names: str) -> int:
        return next((config[name] for name in names if isinstance(config.get(name), int)), 0)

    experts = number("num_experts", "num_local_experts", "n_routed_experts")
    if not experts and not is_dense(kind):
        raise PlanError(f"model.path: {folder / 'config.json'} names no experts; planaria trains MoE models")
    if experts % recipe.parallel.ep:
        raise PlanError(
            f"parallel.ep={recipe.parallel.ep} does not divide the {experts} experts of {folder}; choose a divisor"
        )
    positions = number("max_position_embeddings")
    if positions and recipe.data.sequence_length > positions:
        raise PlanError(
            f"data.sequence_length={recipe.data.sequence_length} is more than the {positions} positions of "
            f"{folder}; lower it"
        )
    return folder_shapes(folder), experts, number("num_experts_per_tok", "moe_topk", "top_k")


def heads_of(recipe: Recipe) -> int:
    """Of the base's attention."""
    if recipe.model.path is None:
        return recipe.model.num_attention_heads
    config = json.loads((Path(recipe.model.path) / "config.json").read_text())
    heads = config.get("text_config", config).get("num_attention_heads")
    return heads if isinstance(heads, int) and heads else 1


def admission(recipe: Recipe, free: int | None) -> Admission | None:
    """What the recipe's tenants take in each worker, of which ``free`` bytes may be taken; None without tenants.

    Raises PlanError.
    """
    if not recipe.tenants:
        return None
    shapes, _, active = base_of(recipe)
    return admit(recipe, shapes, active, number_width(recipe), heads_of(recipe), free)
