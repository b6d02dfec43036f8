"""`planaria adapter export` and `import`: adapters for other tools, and theirs as ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError

from lora.base_facts import BaseFacts
from lora.errors import AdapterError
from lora.exactness import require
from lora.format import Adapter, load_adapter, save_adapter
from lora.merge import format_losses, merge_into_folder
from lora.peft_format import lost_dropout, write_peft
from lora.peft_import import fingerprint_of, import_adapter
from lora.presets import expansions
from lora.tasks import write_tasks
from lora.trained import arrow_of
from lora.upcycled import write_upcycled


def export(adapter_dir: str, out_dir: str, form: str, base_dir: str | None) -> int:
    """Write the adapter as ``form`` to a new folder; prints what was written. Raises AdapterError or FolderError."""
    adapter, out = load_adapter(adapter_dir), Path(out_dir)
    require(form, adapter.banks)
    base = None if base_dir is None else Path(base_dir)
    if base is not None:
        _check_base(adapter, base)
    try:
        _WRITERS[form](adapter, base, out)
    except SafetensorError as error:
        raise AdapterError(f"{base}: a file of its weights is damaged ({error}); copy the folder again") from error
    return 0


def import_peft(peft_dir: str, out_dir: str, base_dir: str, expert_slowest: bool, peft_version: str | None) -> int:
    """Make an adapter folder of PEFT's; prints its banks. Raises AdapterError or FolderError."""
    folders = Path(peft_dir), Path(out_dir), Path(base_dir)
    banks = import_adapter(*folders, expert_slowest=expert_slowest, peft_version=peft_version)
    for name, bank in banks.items():
        print(f"{name}: {bank.preset} r={bank.r} alpha={bank.alpha:g} on {', '.join(bank.targets)}")
    print(f"wrote the adapter to {out_dir}")
    return 0


def make_arrow(out_dir: str, adapter_dirs: tuple[str, ...], top_k: int, temperature: float) -> int:
    """Make an adapter folder that is Arrow over others; prints its bank. Raises AdapterError."""
    tensors, bank, base = arrow_of(adapter_dirs, top_k, temperature)
    banks = {"arrow": bank}
    save_adapter(out_dir, tensors, banks, base)
    print("\n".join(expansions(banks)))
    print(f"wrote the adapter to {out_dir}")
    return 0


def _peft(adapter: Adapter, base: Path | None, out: Path, per_expert: bool = False) -> None:
    count = write_peft(
        adapter.tensors, adapter.banks, out, _facts(adapter, base), per_expert=per_expert, owners=adapter.owners
    )
    _say(lost_dropout(out, adapter.banks))
    print(f"wrote {count} tensors for PEFT to {out}")


def _peft_per_expert(adapter: Adapter, base: Path | None, out: Path) -> None:
    _peft(adapter, base, out, per_expert=True)


def _tasks(adapter: Adapter, base: Path | None, out: Path) -> None:
    count = write_tasks(adapter.tensors, adapter.banks, out, _facts(adapter, base), owners=adapter.owners)
    _say(lost_dropout(out / "task-0", adapter.banks))
    print(f"wrote {count} plain LoRAs for PEFT, one for each task, to {out}/task-0 and on")


def _upcycled(adapter: Adapter, base: Path | None, out: Path) -> None:
    config, losses = write_upcycled(
        adapter.tensors, adapter.banks, _needed(base, "upcycled"), out, owners=adapter.owners
    )
    print(format_losses(losses))
    if config.dtype != torch.float32:
        print(
            f"its routers compute in {str(config.dtype).removeprefix('torch.')} where planaria's compute in fp32: a "
            "token may get other experts where two are nearly as good; load it with dtype=torch.float32 for the exact "
            "function"
        )
    print(f"wrote a {config.model_type} with {config.num_experts_per_tok} experts for each token to {out}")


def _merged(adapter: Adapter, base: Path | None, out: Path) -> None:
    losses = merge_into_folder(adapter.tensors, adapter.banks, _needed(base, "merged"), out, owners=adapter.owners)
    print(format_losses(losses))
    print(f"wrote the base model with the adapter in its weights to {out}")


_WRITERS: dict[str, Callable[[Adapter, Path | None, Path], None]] = {
    "peft": _peft,
    "peft-per-expert": _peft_per_expert,
    "tasks": _tasks,
    "upcycled": _upcycled,
    "merged": _merged,
}


def _say(line: str | None) -> None:
    if line is not None:
        print(line)


def _facts(adapter: Adapter, base: Path | None) -> BaseFacts:
    return adapter.base if base is None else BaseFacts.read(base)


def _needed(base: Path | None, form: str) -> Path:
    if base is None:
        raise AdapterError(f"--to {form} needs the base model's weights; name its folder with --base DIR")
    return base


def _check_base(adapter: Adapter, base: Path) -> None:
    found = fingerprint_of(base)
    if found != adapter.base_fingerprint:
        raise AdapterError(
            f"the adapter was trained on base {adapter.base_fingerprint}, {base} is {found}; give the folder that it "
            "was trained on"
        )
