"""A worker of `planaria train` that also writes its live state down, for tests to compare.

layout_worker.py recover DUMP RECIPE ...
    as it is just after the recovery
layout_worker.py deepspeed DUMP LOAD SAVE RECIPE ...
    DeepSpeed's engine itself loads the folder LOAD; the state is written to DUMP/loaded, and after the run's steps to
    DUMP/saved and, by the engine's save_checkpoint, to SAVE
"""

import sys
from pathlib import Path

import torch

from checkpointing.state.zero import zero_buffers
from trainer import worker
from trainer.snapshots import Snapshots

RECOVER, FIT = Snapshots.recover, worker.fit


def dump(out, snapshots, progress):
    out.mkdir(parents=True, exist_ok=True)
    zero = snapshots.zero_optimizer
    spans = [
        (*_place(span.range), buffer.tensor[span.offset : span.offset + span.range.size].clone())
        for buffer in zero_buffers(zero)  # read anew: DeepSpeed's load replaces the tensors of the moments
        for span in buffer.spans
    ]
    weights = {p.address.param: p.detach().clone() for group in zero.bit16_groups for p in group}
    counts = [float(state["step"]) for state in zero.optimizer.state.values()]
    facts = {"spans": spans, "weights": weights, "counts": counts, "rng": torch.get_rng_state()}
    torch.save(facts | {"step": progress.step, "samples": progress.samples}, out / f"{snapshots.process.rank}.pt")


def _place(named):
    return named.unit, named.kind, named.lo


def recover_and_dump(self, progress):
    plan = RECOVER(self, progress)
    dump(Path(sys.argv[2]), self, progress)
    return plan


def load_fit_save(run):
    out, load, save = map(Path, sys.argv[2:5])
    path, _ = run.engine.load_checkpoint(str(load))
    assert path is not None
    dump(out / "loaded", run.snapshots, run.progress)
    FIT(run)
    dump(out / "saved", run.snapshots, run.progress)
    run.engine.save_checkpoint(str(save))


if __name__ == "__main__":
    if sys.argv[1] == "recover":
        Snapshots.recover = recover_and_dump
        recipe = sys.argv[3:]
    else:
        worker.fit = load_fit_save
        recipe = sys.argv[5:]
    sys.exit(worker.main(recipe[0], recipe[1:]))
