"""A model whose experts are merged softly: two data-parallel workers, a real kill, and no export."""

from __future__ import annotations

import pytest

from trainer import export
from trainer.drill import judge
from trainer.faults import KillSpec

pytestmark = [pytest.mark.drill, pytest.mark.slow]

SETTINGS = ["model.soft={kind: merging, segment: 8}", "model.router_aux_loss_coef=0", "parallel.ep=1"]


def test_a_kill_costs_no_bit_and_export_is_refused(start):
    job = start("merged", SETTINGS)
    rows = job.finish()
    kill = KillSpec(1, 7, "optimizer")
    killed = start("merged-killed", SETTINGS, kill=str(kill))
    verdict = judge(killed.recipe, kill, rows, killed.finish())
    assert verdict.passed, verdict.problems
    heldout = [row["loss"] for row in rows if row["kind"] == "heldout"]
    assert heldout[-1] < heldout[0]
    with pytest.raises(export.ExportError, match="no Hugging Face class"):
        export.main(str(job.run_dir), str(job.run_dir / "out"))
    assert not (job.run_dir / "out").exists()
