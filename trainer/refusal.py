"""How a worker tells the launcher that the user must act, so that it is not restarted in vain.

torchrun restarts a worker whatever its exit status. So `planaria train` names a file in the environment; the worker
that meets a user's mistake writes it there, and a worker that is started again finds it and leaves at once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

VARIABLE = "PLANARIA_REFUSAL"


def refuse(message: str) -> None:
    """Say it, and leave it for the launcher and for the workers it restarts."""
    path = os.environ.get(VARIABLE)
    if path:
        # Several workers may refuse at once, while the launcher reads what the first one wrote.
        written = Path(f"{path}.{os.getpid()}")
        written.write_text(message)
        written.replace(path)
    else:
        print(message, file=sys.stderr)


def refused() -> bool:
    """Whether a worker of this launch has refused already."""
    path = os.environ.get(VARIABLE)
    return bool(path) and Path(path).exists()


def is_users_mistake(error: Exception) -> bool:
    """Our own ValueErrors are written for the user; any other exception is our fault and keeps its traceback."""
    ours = ("trainer", "moe", "lora", "checkpointing", "inference")
    return isinstance(error, ValueError) and type(error).__module__.partition(".")[0] in ours
