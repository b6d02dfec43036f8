"""The training step of several adapters at once: each its own data, loss, learning rate, clipping and random streams.

A micro-batch is the tenants' sequences one after another. What a tenant computes depends on its own rows only, and its
gradients lie in a parameter group of its own, so that each trains as it would alone. A tenant whose loss or gradient is
no number keeps its weights in that step: the optimizer goes on with a gradient of zero and a rate of 0, so that its
moments decay and its count of steps grows. After ``max_bad_steps`` such steps in a row it keeps them for good; its rows
stay in the batch, so that the others' products keep their shapes. Those of a tenant that has finished its own steps
leave it.

Shapes: A tenants, T tokens of all of them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from lora.tenant_watch import TenantWatch
from moe.context import BatchContext, Slots, batch_context
from trainer import data as data_module
from trainer.batches import Batch, labels_of_step, make_batch, sent, training_rows
from trainer.chat_data import ChatDataset
from trainer.clipping import GroupClip
from trainer.data import DataBundle
from trainer.rendezvous import Process
from trainer.schedules import learning_rate
from trainer.schema import Recipe
from trainer.tenant_recipe import alone

if TYPE_CHECKING:
    from trainer.loop import Run


class TenantError(ValueError):
    """No tenant is left to train; says why each stopped."""


@dataclass(frozen=True)
class Member:
    """One tenant: the recipe of a run of its own that it should equal, and that run's data."""

    name: str
    recipe: Recipe
    data: DataBundle
    max_bad_steps: int


@dataclass(frozen=True)
class Share:
    """One tenant's part of a micro-batch, as it would be if it trained alone; ``rows`` is None if it takes no part."""

    rows: Batch | None

    @property
    def sequences(self) -> int:
        return len(self.rows.inputs["input_ids"]) if self.rows is not None else 0


@dataclass
class Verdict:
    """What all ranks agree on before the optimizer of a step: each tenant's mean loss, and its gradient's norm."""

    losses_A: list[float]
    norms_A: list[float]


class Tenants:
    """The tenants of a run. ``clip`` must be there before the first step; see :class:`trainer.clipping.GroupClip`."""

    def __init__(self, recipe: Recipe, members: list[Member], clip: GroupClip, watch: TenantWatch) -> None:
        self.recipe, self.members, self.clip, self.watch = recipe, members, clip, watch
        self.last = Verdict([], [])

    # -- the step ----------------------------------------------------------------------------------------------------

    def train_step(self, run: Run, step: int) -> float:
        """Forward and backward over all tenants' shares of the batch, then one optimizer step.

        Returns :meth:`mean_loss`. Raises TenantError if all of them have stopped.
        """
        engine, accumulation = run.engine, self.recipe.accumulation
        self._set_rates(run, step)
        totals_A = torch.zeros(len(self.members), device=run.process.device)
        for micro in range(accumulation):
            run.phases.enter("forward", step)
            shares = self._shares(run, step, micro)
            streams = tuple(f"{m.recipe.train.seed}/step {step}/{micro}/rank {run.process.rank}" for m in self.members)
            with batch_context(self._context(shares, streams, micro)):
                losses_A = self._losses(engine, engine.module, shares)
                run.phases.enter("backward", step)
                engine.backward(losses_A.sum())
            totals_A += losses_A.detach() / accumulation
            if micro == accumulation - 1:
                run.phases.enter("exchange", step)
                self.last = self._exchange(run, totals_A)
                self._judge(run, step)
                run.events.write("optimizer", step=step)
                run.phases.enter("optimizer", step)
                run.snapshots.reserve(step)
            engine.step()
        run.progress.step = step
        there = {m.name for m, present in zip(self.members, self.takes_part(step), strict=True) if present}
        self.watch.check(there, run.process.total)
        return self.mean_loss(run, step)

    def mean_loss(self, run: Run, step: int) -> float:
        """Of the tenants that train in ``step``, which is just done, and have a loss; no number if none has."""
        trained = [
            loss
            for loss, member, present in zip(self.last.losses_A, self.members, self.takes_part(step), strict=True)
            if present and not self._state(run, member)["stopped"] and math.isfinite(loss)
        ]
        return sum(trained) / len(trained) if trained else math.nan

    def takes_part(self, step: int) -> list[bool]:
        """Whose rows are in the batch of ``step``: a matter of the recipe alone, never of what went wrong."""
        return [step <= member.recipe.train.steps for member in self.members]

    def _set_rates(self, run: Run, step: int) -> None:
        groups = run.engine.optimizer.param_groups
        for group, member, present in zip(groups, self.members, self.takes_part(step), strict=True):
            assert group["name"] == member.name
            train = member.recipe.train
            trains = present and not self._state(run, member)["stopped"]
            rate = learning_rate(
                step,
                peak=train.lr,
                steps=train.steps,
                warmup_steps=train.warmup_steps,
                min_lr_ratio=train.min_lr_ratio,
                schedule=train.schedule,
            )
            group["lr"] = rate if trains else 0.0

    def _shares(self, run: Run, step: int, micro: int) -> list[Share]:
        shares, ids, consumed = [], [], b""
        process = run.process
        for member, present in zip(self.members, self.takes_part(step), strict=True):
            if not present:
                shares.append(Share(None))
                continue
            dataset = member.data.train
            labels = labels_of_step(member.recipe, dataset, step)
            mean_over = None if labels is None else labels / (process.world * self.recipe.accumulation)
            mine, rows = training_rows(member.recipe, dataset, step, micro, process.rank, process.world)
            shares.append(Share(make_batch(rows, process.device, mean_over)))
            ids += mine
            consumed += shares[-1].rows.consumed
        run.progress.consume(ids, consumed)
        run.progress.samples += len(ids) * process.world
        return shares

    def _context(self, shares: list[Share], streams: tuple[str, ...], micro: int) -> BatchContext:
        there = [share.rows for share in shares if share.rows is not None]
        ids = [batch.inputs["input_ids"] for batch in there]
        length, device = ids[0].shape[1], ids[0].device
        rows = tuple(share.sequences * length for share in shares)
        slot_T = sent(torch.arange(len(rows)).repeat_interleave(torch.tensor(rows), output_size=sum(rows)), device)
        names = [name for name in there[0].facts if name.endswith("_T")]
        facts = {name: torch.cat([batch.facts[name] for batch in there]) for name in names}
        return BatchContext(
            aux_scale=1 / self.recipe.accumulation,
            shape=(sum(map(len, ids)), length),
            slot_T=slot_T,
            slots=Slots(rows, streams),
            micro_step=micro,
            samples=max(batch.facts.get("samples", 1) for batch in there),
            **facts,
        )

    @staticmethod
    def _losses(forward: Callable[..., Any], model: Any, shares: list[Share]) -> Tensor:
        """Each tenant's mean loss over its own tokens, as the model itself would compute it alone: [A]."""
        there = [share.rows.inputs for share in shares if share.rows is not None]
        common = [name for name in ("input_ids", "position_ids") if name in there[0]]
        logits = forward(**{name: torch.cat([own[name] for own in there]) for name in common}, use_cache=False).logits
        losses = []
        for share, own in zip(shares, logits.split([share.sequences for share in shares]), strict=True):
            if share.rows is None:
                losses.append(logits.new_zeros((), dtype=torch.float32))
                continue
            rest = {name: v for name, v in share.rows.inputs.items() if name in ("labels", "num_items_in_batch")}
            losses.append(model.loss_function(own, vocab_size=model.config.vocab_size, **rest).float())
        return torch.stack(losses)

    def _exchange(self, run: Run, losses_A: Tensor) -> Verdict:
        """The step's one small collective: every rank's losses, parts of the gradients' norms, and newest sealed step.

        As in :mod:`trainer.loop`, all ranks know after it which step all have sealed.
        """
        squares_A, device = self.clip.squares(), run.process.device
        sealed = torch.tensor([float(run.snapshots.settle())], dtype=torch.float64, device=device)
        mine = torch.cat([sealed, losses_A.double(), squares_A.double()])
        everyone = [torch.empty_like(mine) for _ in range(run.process.world)]
        dist.all_gather(everyone, mine)
        sealed_R1, losses_RA, squares_RA = torch.stack(everyone).cpu().split([1, *[len(self.members)] * 2], 1)
        run.snapshots.committed = int(sealed_R1.min())
        norms_A = squares_RA.sum(0).float().sqrt()
        return Verdict(losses_RA.mean(0).tolist(), norms_A.tolist())

    def _judge(self, run: Run, step: int) -> None:
        """Clip each tenant's gradient by its own norm; take the step away from a tenant that has none."""
        groups = run.engine.optimizer.param_groups
        for slot, (member, present) in enumerate(zip(self.members, self.takes_part(step), strict=True)):
            state, loss, norm = self._state(run, member), self.last.losses_A[slot], self.last.norms_A[slot]
            good = math.isfinite(loss) and math.isfinite(norm)
            if good and present and not state["stopped"]:
                state["bad_in_row"] = 0
                self.clip.scale(slot, norm, member.recipe.train.max_grad_norm)
                continue
            self.clip.silence(slot)
            groups[slot]["lr"] = 0.0
            if present and not state["stopped"]:
                state["bad"] += 1
                state["bad_in_row"] += 1
                self._report_bad(run, step, member, state)
        left = [m for m, p in zip(self.members, self.takes_part(step), strict=True) if p]
        if left and all(self._state(run, member)["stopped"] for member in left):
            names = ", ".join(f"{m.name} (at step {self._state(run, m)['stopped']})" for m in left)
            raise TenantError(
                f"step {step}: every tenant has stopped, since losses or gradients were no numbers: {names}; lower "
                "their lr, with log.run=NAME"
            )

    def _report_bad(self, run: Run, step: int, member: Member, state: dict[str, int]) -> None:
        slot = self.members.index(member)
        if state["bad_in_row"] >= member.max_bad_steps:
            state["stopped"] = step
        if run.process.rank != 0:
            return
        loss, norm = self.last.losses_A[slot], self.last.norms_A[slot]
        run.events.write("tenant_bad_step", step=step, tenant=member.name, loss=loss, grad_norm=norm, **state)
        then = (
            f"that was {state['bad_in_row']} in a row, so it stops; lower tenants.{member.name}.lr"
            if state["stopped"]
            else "its weights stay as they are"
        )
        print(f"step {step}: tenant {member.name}: loss {loss}, grad norm {norm}: {then}", flush=True)

    @staticmethod
    def _state(run: Run, member: Member) -> dict[str, int]:
        return run.progress.tenants.setdefault(member.name, {"bad": 0, "bad_in_row": 0, "stopped": 0})

    # -- reports -----------------------------------------------------------------------------------------------------

    def tokens(self, step: int) -> int:
        """Of all tenants together in one step."""
        return sum(
            self.tokens_of(member) * present
            for member, present in zip(self.members, self.takes_part(step), strict=True)
        )

    def tokens_of(self, member: Member) -> int:
        return member.recipe.train.global_batch_size * self.recipe.data.sequence_length

    def report_step(self, run: Run, step: int, seconds: float, printed: bool) -> None:
        """One event for each tenant that takes part, and if wanted one line."""
        if run.process.rank != 0:
            return
        parts, groups = [], run.engine.optimizer.param_groups
        for slot, (member, present) in enumerate(zip(self.members, self.takes_part(step), strict=True)):
            if not present:
                parts.append(f"{member.name} finished")
                continue
            state, loss, norm = self._state(run, member), self.last.losses_A[slot], self.last.norms_A[slot]
            run.events.write(
                "tenant",
                step=step,
                tenant=member.name,
                loss=loss,
                grad_norm=norm,
                lr=groups[slot]["lr"],
                tokens_per_s=self.tokens_of(member) / seconds,
                **state,
            )
            what = (
                f"stopped at step {state['stopped']}" if state["stopped"] else f"loss {loss:.4f} grad norm {norm:.3f}"
            )
            parts.append(f"{member.name} {what}")
        if printed:
            print(f"  {'; '.join(parts)}", flush=True)

    def report_heldout(self, run: Run, step: int) -> None:
        """Every tenant's mean loss on its own held-out text, spread over all ranks. A collective."""
        run.phases.enter("evaluate", step)
        totals_A2 = torch.zeros(len(self.members), 2, dtype=torch.float64, device=run.process.device)
        run.engine.module.eval()
        with torch.no_grad():
            for slot, member in enumerate(self.members):
                totals_A2[slot] = self._heldout(run, slot, member)
        run.engine.module.train()
        dist.all_reduce(totals_A2)
        if run.process.rank != 0:
            return
        for member, (total, count) in zip(self.members, totals_A2.tolist(), strict=True):
            loss, entropy = total / count, member.data.unigram_entropy_nats
            run.events.write("heldout", step=step, tenant=member.name, loss=loss, unigram_entropy=entropy)
            print(
                f"held-out loss of {member.name} at step {step}: {loss:.4f} nats (unigram entropy {entropy:.4f})",
                flush=True,
            )

    def _heldout(self, run: Run, slot: int, member: Member) -> Tensor:
        """Of this rank's share: (sum of losses, how many), of text over rows, of chat over tokens with loss: [2]."""
        dataset, model = member.data.heldout, run.engine.module
        wanted = min(self.recipe.train.eval_sequences, len(dataset))
        total_2 = torch.zeros(2, dtype=torch.float64, device=run.process.device)
        for index in range(run.process.rank, wanted, run.process.world):
            row = Share(make_batch([dataset[index]], run.process.device, 1.0))
            shares = [row if other == slot else Share(None) for other in range(len(self.members))]
            context = self._context(shares, ("",) * len(shares), 0)
            with batch_context(replace(context, balance=False)):
                loss = self._losses(model, model, shares)[slot].double()
            weight = int(dataset.weights[index]) if isinstance(dataset, ChatDataset) else 1
            total_2 += torch.stack([loss, torch.ones_like(loss) * weight])
        return total_2


def load_members(recipe: Recipe, process: Process) -> list[Member]:
    """Every tenant with its text; rank 0 prints a line about each. Raises DataError."""
    members = []
    for name, section in recipe.tenants.items():
        own = alone(recipe, name)
        bundle = data_module.load_section(
            own.data, cache_root=data_module.cache_root(recipe), model_path=recipe.model.path
        )
        if process.rank == 0:
            print(
                f"data of {name}: {bundle.train_documents} documents train, {bundle.heldout_documents} held out; "
                f"{len(bundle.train)} and {len(bundle.heldout)} sequences of {own.data.sequence_length} tokens",
                flush=True,
            )
        members.append(Member(name, own, bundle, section.max_bad_steps))
    return members


def data_key(members: list[Member]) -> str:
    """Names what all of them read together."""
    return hashlib.sha256("/".join(member.data.key for member in members).encode()).hexdigest()[:32]
