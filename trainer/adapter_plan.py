"""`planaria adapter plan R`: what a recipe's banks train, cost and can be written as (no torch here).

Operations are counted in matrix products alone. The floor is what the frozen model costs a token: every product
forward, and again for the gradient of its input; a full fine-tuning costs half as much again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from inspect import getdoc
from math import prod

from checkpointing.cost import size
from lora.config import BankConfig
from lora.cost import added, floor, parameters
from lora.errors import AdapterError
from lora.exactness import obstacles
from lora.methods import METHODS
from lora.presets import expand, expansion
from trainer.activations import BASE, micro_batches, saved_bytes, working_bytes
from trainer.documents import matching_files
from trainer.model_shapes import ModelShapes, Shapes, model_shapes
from trainer.plan import Plan, PlanError, base_of, heads_of, number_width, plan_run
from trainer.schema import Recipe
from trainer.tenant_recipe import batch_sizes, data_of


@dataclass(frozen=True)
class BankPlan:
    """One bank.

    Attributes:
        places: how many it is put on; ``layers`` of the model have one.
        trainable: numbers, all experts and all tenants' copies counted.
        floor, added: operations a token of the frozen places themselves and of the bank, forward and backward.
        saved: bytes of a micro-batch that the bank keeps for backward.
    """

    name: str
    expansion: str
    places: int
    layers: int
    trainable: int
    floor: int
    added: int
    saved: int


@dataclass(frozen=True)
class TenantPlan:
    """What one of several tenants trains on: ``sequences`` in each of its ``steps``, from ``files`` of ``nbytes``."""

    name: str
    steps: int
    sequences: int
    tokens: int
    files: int
    nbytes: int
    reads: str


@dataclass(frozen=True)
class AdapterPlan:
    """All banks of a recipe.

    Attributes:
        floor: operations a token of the whole frozen model, forward and backward.
        saved: bytes of a micro-batch that the frozen model keeps for backward.
        working: bytes that backward needs beside what was kept.
        peak: of a worker in backward: weights, gradients, optimizer, what is kept, and the former, all at once.
        exports: by form, why it is not exact, or nothing if it is.
        tenants: each has a copy of the banks; none: there is one, for all that the recipe reads.
        first_pass: operations a token of a pass without adapters, which routers of its states need before the step's.
    """

    banks: tuple[BankPlan, ...]
    total: int
    floor: int
    saved: int
    working: int
    peak: int
    run: Plan
    exports: dict[str, str]
    tenants: tuple[TenantPlan, ...] = ()
    first_pass: int = 0

    @property
    def trainable(self) -> int:
        return sum(bank.trainable for bank in self.banks)

    @property
    def kept(self) -> int:
        return self.saved + sum(bank.saved for bank in self.banks)


def plan_adapters(recipe: Recipe) -> AdapterPlan:
    """Raises PlanError for a recipe without adapters, and for banks that its model cannot carry; DataError for tenants
    whose files are not there."""
    if not recipe.adapter:
        raise PlanError("the recipe has no section adapter; add one, e.g. 'adapter: {one: {preset: lora}}'")
    run = plan_run(recipe)
    shapes, _, active = base_of(recipe)
    model = model_shapes(shapes, active)
    try:
        placed = model.resolve(recipe.adapter)
    except AdapterError as error:
        raise PlanError(str(error)) from None
    width, vocabulary = number_width(recipe), _rows(shapes, "embed_tokens.weight")
    saved: Counter[str] = Counter()
    working, copies = 0, max(1, len(recipe.tenants))
    for batch in micro_batches(recipe, width, heads_of(recipe), vocabulary):
        saved.update(saved_bytes(model, placed, batch))
        working += working_bytes(placed, batch)
    banks = []
    for name, bank in recipe.adapter.items():
        mine = [(one, here, where) for one, here, where in placed if one.bank == name]
        banks.append(
            BankPlan(
                name,
                expansion(bank),
                len(mine),
                len({one.layer for one, _, _ in mine}),
                copies * sum(parameters(here, where, one.path.rpartition(".")[2]).total for one, here, where in mine),
                sum(floor(here, where) for _, here, where in mine),
                sum(added(here, where) for _, here, where in mine),
                saved[name],
            )
        )
    peak = run.weight_bytes + run.gradient_bytes + run.optimizer_bytes + sum(saved.values()) + working
    whole, exports = sum(run.total.values()), obstacles(recipe.adapter)
    twice = any(here.config.score == "states" for _, here, _ in placed)
    return AdapterPlan(
        tuple(banks), whole, _floor(model, shapes), saved[BASE], working, peak, run, exports, _tenants(recipe),
        2 * _layers(model) if twice else 0,
    )  # fmt: skip


def _tenants(recipe: Recipe) -> tuple[TenantPlan, ...]:
    if not recipe.tenants:
        return ()
    found = []
    for (name, tenant), sequences in zip(recipe.tenants.items(), batch_sizes(recipe), strict=True):
        data, steps = data_of(recipe, name), tenant.steps or 0
        files = [path for _, path in matching_files(data)]
        reads = f"{data.format} of {data.source}: {', '.join(data.include)}"
        nbytes = sum(path.stat().st_size for path in files)
        tokens = steps * sequences * data.sequence_length
        found.append(TenantPlan(name, steps, sequences, tokens, len(files), nbytes, reads))
    return tuple(found)


def _rows(shapes: Shapes, name: str) -> int:
    return next((shape[0] for path, shape in shapes.items() if path.endswith(name)), 0)


def _floor(model: ModelShapes, shapes: Shapes) -> int:
    """Of the whole model: linear layers, the experts that a token uses, the output layer."""
    output = prod(next((shape for path, shape in shapes.items() if path.endswith("embed_tokens.weight")), (0,)))
    return 4 * (_layers(model) + output)


def _layers(model: ModelShapes) -> int:
    """Weights that a token meets in the decoder layers."""
    linear = sum(map(prod, model.linear.values()))
    return linear + sum(model.active * outs * ins for _, outs, ins in model.experts.values())


def table(plan: AdapterPlan) -> str:
    """The plan as text for a person."""
    return "\n".join(_lines(plan))


def _lines(plan: AdapterPlan) -> Iterator[str]:
    for bank in plan.banks:
        yield f"{bank.name} = {bank.expansion}"
    yield ""
    cells = [("bank", "places", "layers", "trainable", "of model", "operations", "of floor", "kept")]
    for bank in plan.banks:
        of_floor = f"{1 + bank.added / bank.floor:.3f}x" if bank.floor else "-"
        share = f"{100 * bank.trainable / plan.total:.3f} %"
        numbers = (str(bank.places), str(bank.layers), f"{bank.trainable:,}", share, f"{bank.added:,}")
        cells.append((bank.name, *numbers, of_floor, size(bank.saved)))
    more = sum(bank.added for bank in plan.banks) + plan.first_pass
    share = f"{100 * plan.trainable / plan.total:.3f} %"
    whole = f"{1 + more / plan.floor:.3f}x"
    cells.append(("in all", "", "", f"{plan.trainable:,}", share, f"{more:,}", whole, size(plan.kept - plan.saved)))
    for name, *columns in cells:
        yield f"{name:<14}" + "".join(f" {text:>12}" for text in columns)
    yield "operations: added to a token's forward and backward; of floor: with them, times the frozen places' own (in"
    yield f"all: the whole frozen model's {plan.floor:,}); kept: for the backward of a micro-batch"
    if plan.first_pass:
        yield f"in all: with a first pass without adapters, {plan.first_pass:,} operations a token"
    if plan.tenants:
        count = len(plan.tenants)
        yield f"trainable, kept, memory: of all {count} tenants; operations: a token meets one tenant's copy"
        yield ""
        yield f"{'tenant':<14} {'steps':>8} {'sequences':>10} {'tokens':>12} {'files':>7} {'size':>11}  reads"
        for one in plan.tenants:
            row = f"{one.steps:>8} {one.sequences:>10} {one.tokens:>12,} {one.files:>7,} {size(one.nbytes):>11}"
            yield f"{one.name:<14} {row}  {one.reads}"
        yield "sequences: in a step, of all workers; tokens: in all of its steps; size: of the files that it reads"
    yield ""
    run = plan.run
    yield (
        f"memory of a worker  {size(plan.peak)} at the most: weights {size(run.weight_bytes)}, gradients "
        f"{size(run.gradient_bytes)}, optimizer {size(run.optimizer_bytes)}, kept for backward {size(plan.kept)} "
        f"(the frozen model {size(plan.saved)}), in backward {size(plan.working)}"
    )
    exact = [form for form, why in plan.exports.items() if not why]
    merged = plan.exports.get("merged")
    yield f"merges into the base  {f'no: {merged}' if merged else 'yes, but for the rounding of its weights'}"
    yield f"exact exports  {', '.join(exact) or 'only the adapter folder itself'}"
    for form, why in plan.exports.items():
        if why and form != "merged":
            yield f"  not {form}: {why}"


def presets_text(name: str | None) -> str:
    """What `planaria adapter presets [NAME]` prints. Raises PlanError for a name that there is none of."""
    if name is None:
        width = max(map(len, METHODS))
        lines = [f"{preset:<{width}}  {(getdoc(method) or '').splitlines()[0]}" for preset, method in METHODS.items()]
        return "\n".join([*lines, "planaria adapter presets NAME: formula, defaults, and what could not be verified"])
    method = next((found for preset, found in METHODS.items() if preset == name), None)
    if method is None:
        raise PlanError(f"no preset {name!r}; one of {', '.join(METHODS)}")
    full = expand(BankConfig(name))  # type: ignore[arg-type]
    return f"{name}: {getdoc(method)}\n\nAll fields in use:\n  {expansion(full).partition(': ')[2]}"
