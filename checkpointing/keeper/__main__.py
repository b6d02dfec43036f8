"""``python -m checkpointing.keeper``: become the node's keeper, detached from whoever started it."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m checkpointing.keeper")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--fingerprint", required=True)
    parser.add_argument("--linger", type=float, required=True, help="seconds to stay without workers")
    parser.add_argument("--ready-fd", type=int, required=True, help="told 'ready', 'exists' or an error, then closed")
    options = parser.parse_args()
    # The starter made us a session leader; as its child we can never get a terminal, and init is our parent.
    if os.fork():
        os._exit(0)
    _detach(options.run_dir)
    status = 1
    try:
        from checkpointing.keeper.service import serve

        status = serve(options.run_dir, options.fingerprint, options.linger, options.ready_fd)
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    # A thread that hangs on a dead disk must not keep us.
    os._exit(status)


def _detach(run_dir: Path) -> None:
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    log = os.open(run_dir / "keeper.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(null)
    os.close(log)


main()
