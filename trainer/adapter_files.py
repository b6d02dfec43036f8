"""`planaria adapter export` and `import`: adapters for other tools, and theirs as ours."""

from __future__ import annotations

from pathlib import Path

from lora.errors import AdapterError
from lora.exactness import require
from lora.format import Adapter, load_adapter
from lora.merge import merge_into_folder
from lora.peft_format import write_peft
from lora.peft_import import import_adapter
from lora.tasks import write_tasks
from lora.upcycled import write_upcycled
from moe.fingerprint import fingerprint


def export(adapter_dir: str, out_dir: str, form: str, base_dir: str | None) -> int:
    """Write the adapter as ``form`` to a new folder; prints what was written. Raises AdapterError or FolderError."""
    adapter, out = load_adapter(adapter_dir), Path(out_dir)
    require(form, adapter.banks)
    base = None if base_dir is None else Path(base_dir)
    if base is not None:
        _check_base(adapter, base)
    elif form in ("upcycled", "merged"):
        raise AdapterError(f"--to {form} needs the model's own weights; name its folder with --base DIR")
    if form == "tasks":
        count = write_tasks(adapter, out, base)
        print(f"wrote {count} plain LoRAs, one for each task, to {out}/task-N")
    elif form == "upcycled":
        print(write_upcycled(adapter, base, out))
    elif form == "merged":
        print(merge_into_folder(adapter, base, out))
    else:
        tensors = write_peft(adapter, out, base=base, per_expert=form == "peft-per-expert")
        print(f"wrote {tensors} tensors for PEFT to {out}")
    return 0


def import_peft(peft_dir: str, out_dir: str, base_dir: str, expert_slowest: bool) -> int:
    """Make an adapter folder of PEFT's; prints its banks. Raises AdapterError or FolderError."""
    banks = import_adapter(Path(peft_dir), Path(out_dir), Path(base_dir), expert_slowest=expert_slowest)
    for name, bank in banks.items():
        print(f"{name}: {bank.preset} r={bank.r} alpha={bank.alpha:g} on {', '.join(bank.targets)}")
    print(f"wrote the adapter to {out_dir}")
    return 0


def _check_base(adapter: Adapter, base: Path) -> None:
    found = fingerprint(base)
    if found != adapter.base_fingerprint:
        raise AdapterError(
            f"the adapter was trained on base {adapter.base_fingerprint}, {base} is {found}; give the folder that it "
            "was trained on"
        )
