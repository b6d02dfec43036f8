"""What drills do to state that is kept: flip bits of it, cut it, take it away, exchange it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from checkpointing.keeper.launch import connect
from checkpointing.keeper.protocol import Inbox, Message, raise_if_error, receive_one, send_all
from checkpointing.records import PAGE, State, parts_of, read_header, state_of
from checkpointing.schedule import Held, Rules, needed_for
from checkpointing.slots import Arena, ArenaShape
from checkpointing.storage import MANIFEST
from checkpointing.store import list_checkpoints

_HEADER_BYTES = 88  # fields, checksum and state word


class DamageError(RuntimeError):
    """There is nothing to damage."""


def ask_keeper(run_dir: Path, message: Message) -> tuple[Message, list[int]]:
    """One request to the run's keeper, as nobody's worker. Raises DamageError if none lives."""
    found = connect(run_dir.resolve())
    if found is None:
        raise DamageError(f"{run_dir} has no keeper")
    sock, info = found
    with sock:
        sock.settimeout(10)
        send_all(sock, {**message, "id": 0, "token": info.token})
        answer, fds = receive_one(sock, Inbox())
    return raise_if_error(answer), fds


def workers_attached(run_dir: Path) -> bool:
    status, _ = ask_keeper(run_dir, {"op": "status"})
    return any(keep["attached"] for keep in status["keeps"].values())


def flip_in_memory(run_dir: Path, choice: random.Random) -> tuple[int, str]:
    """Flip one bit of a record that restoring the newest step reads. Returns the record's step, and where in words."""
    status, _ = ask_keeper(run_dir, {"op": "status"})
    common = set.intersection(*[set(keep["steps"]) for keep in status["keeps"].values()])
    if not common:
        raise DamageError(f"no step is complete in the memory of {run_dir}")
    coordinate = choice.choice(sorted(status["keeps"]))
    answer, fds = ask_keeper(run_dir, {"op": "arena", "coordinate": coordinate})
    arena = Arena(fds[0], ArenaShape.from_list(answer["shape"]))
    try:
        index = choice.choice(_needed(arena, max(common)))
        header = read_header(arena.slots[index])
        regions = {
            "header": (0, _HEADER_BYTES),
            "table": (PAGE, PAGE + header.table_bytes),
            "payload": (header.payload_offset, header.payload_offset + header.payload_bytes),
        }
        region = choice.choice([name for name, (lo, hi) in regions.items() if lo < hi])
        at, bit = choice.randrange(*regions[region]), choice.randrange(8)
        arena.slots[index][at] ^= 1 << bit
    finally:
        arena.close()
    return header.step, f"{coordinate}, slot {index} ({header.kind.name}), {region}, byte {at}, bit {bit}"


def _needed(arena: Arena, step: int) -> list[int]:
    """The slots that restoring ``step`` reads."""
    held = {}
    for index, view in enumerate(arena.slots):
        if state_of(view) is State.SEALED:
            header = read_header(view)
            held[index] = Held(header.kind, header.step, parts_of(view, header))
    parts = {part for record in held.values() for part in record.parts}
    needed = needed_for(held.values(), step, Rules(len(parts)))
    return [index for index, record in held.items() if record in needed]


def flip_in_file(path: Path, choice: random.Random) -> str:
    """Flip one random bit of a file; returns where in words."""
    blob = bytearray(path.read_bytes())
    at, bit = choice.randrange(len(blob)), choice.randrange(8)
    blob[at] ^= 1 << bit
    path.write_bytes(blob)
    return f"{path.name}, byte {at}, bit {bit}"


def newest_checkpoint(run_dir: Path) -> tuple[int, Path]:
    """Raises DamageError if the run has none."""
    found = list_checkpoints(run_dir / "checkpoints")
    if not found:
        raise DamageError(f"{run_dir} has no checkpoint")
    step, path = found[-1]
    return step, Path(str(path))


def flip_on_disk(run_dir: Path, choice: random.Random) -> tuple[int, str]:
    """Flip one bit of a file of the run's newest checkpoint. Returns its step, and where in words."""
    step, path = newest_checkpoint(run_dir)
    return step, flip_in_file(choice.choice(sorted(path.iterdir())), choice)


def truncate(checkpoint: Path) -> None:
    file = _last_file(checkpoint)
    with file.open("rb+") as opened:
        opened.truncate(file.stat().st_size * 2 // 3)


def remove_file(checkpoint: Path) -> None:
    _last_file(checkpoint).unlink()


def swap_files(checkpoint: Path) -> None:
    """Exchange the files of the first two workers: each holds other experts."""
    first, second = sorted(checkpoint.glob("*.safetensors"))[:2]
    spare = checkpoint / "spare"
    first.rename(spare)
    second.rename(first)
    spare.rename(second)


def _last_file(checkpoint: Path) -> Path:
    return sorted(path for path in checkpoint.iterdir() if path.name != MANIFEST)[-1]


def rewrite_hint(text: str) -> Callable[[Path], None]:
    """Make ``latest`` say something else."""

    def rewrite(checkpoint: Path) -> None:
        (checkpoint.parent / "latest").write_text(text)

    return rewrite
