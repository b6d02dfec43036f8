"""`make demo`: the whole story on one machine. Train, kill, recover bit-exactly, fine-tune, export, generate."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from checkpointing.keeper.control import stop_keeper
from trainer.events import read_events
from trainer.timesplit import Seconds

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
KILL = "rank=1,step=110,at=optimizer"
FOLDER = Path("runs/demo")  # the demo's own: nothing else under runs/ is touched
PROMPT = "def __init__(self, "
STEP_TIMEOUT_S = 900


def planaria(*arguments: str) -> str:
    """Run one `planaria` command, showing its output as it comes; exits if it fails. Returns what it printed."""
    print(f"\n$ planaria {' '.join(arguments)}", flush=True)
    command = [sys.executable, "-m", "trainer", *arguments]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
        status = process.wait(timeout=STEP_TIMEOUT_S)
    if status != 0:
        sys.exit(f"demo: `planaria {arguments[0]}` failed with status {status}")
    return "".join(lines)


def main() -> int:
    began = time.monotonic()
    drill, base, lora = FOLDER / "quickstart-drill", FOLDER / "base", FOLDER / "quickstart-lora"
    for run in (drill / "undisturbed", drill / "killed", lora):
        stop_keeper(run, persist=False)  # an earlier demo may have been interrupted
    shutil.rmtree(FOLDER, ignore_errors=True)
    where = (f"log.dir={FOLDER}", "data.cache_dir=runs/cache")
    planaria("drill", str(RECIPES / "quickstart.yaml"), "--kill", KILL, *where)
    planaria("export", str(drill / "killed"), str(base))
    planaria("train", str(RECIPES / "quickstart-lora.yaml"), f"model.path={base}", *where)
    planaria("export", str(lora), str(lora / "export"))
    text = planaria(
        "generate", str(lora / "export"), "--adapter", str(lora / "export" / "adapter"),
        "--prompt", PROMPT, "--max-new-tokens", "48", "--expert-budget", "0.25",
    )  # fmt: skip
    print_table(drill / "killed", lora, text, time.monotonic() - began)
    return 0


def print_table(killed: Path, lora: Path, generated: str, seconds: float) -> None:
    """What happened, in words and figures; every one read from the runs' own records."""
    verdict = json.loads((killed / "verdict.json").read_text())
    rows = read_events(killed)
    held, tuned = _heldout(rows), _heldout(read_events(lora))
    exact = verdict["state_hash_undisturbed"] == verdict["state_hash_killed"]
    body, _, figures = generated.strip().rpartition("\n")
    adapter = sum(f.stat().st_size for f in (lora / "export" / "adapter").iterdir())
    lines: list[tuple[str, str]] = [
        ("steps", f"{verdict['steps']} trained, {verdict['optimizer_steps']} executed over all attempts"),
        ("held-out loss", f"{held[0]['loss']:.3f} -> {held[-1]['loss']:.3f} nats "
                          f"(fell by {held[0]['loss'] - held[-1]['loss']:.2f})"),
        ("unigram entropy", f"{held[0]['unigram_entropy']:.3f} nats: "
                            f"{'beaten' if held[-1]['loss'] < held[0]['unigram_entropy'] else 'not beaten'}"),
        ("killed at", verdict["kill"]),
        ("recovered from", f"{verdict['tier']}, step {verdict['resumed_step']}, {verdict['steps_lost']} step(s) lost"),
        ("recovery time", str(Seconds(**verdict["seconds"]))),
        ("bit-exact", "yes" if exact else "NO"),
        ("  undisturbed", verdict["state_hash_undisturbed"]),
        ("  killed", verdict["state_hash_killed"]),
        ("fine-tuning", f"held-out loss {tuned[0]['loss']:.3f} -> {tuned[-1]['loss']:.3f} nats on new text"),
        ("adapter", f"{adapter / 1e6:.2f} MB"),
        ("generated", repr(body)),
        ("inference", figures),
        ("demo took", f"{seconds:.0f} s"),
    ]  # fmt: skip
    width = max(len(name) for name, _ in lines)
    print("\n" + "-" * 100)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")
    print("-" * 100)


def _heldout(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["kind"] == "heldout"]


if __name__ == "__main__":
    sys.exit(main())
