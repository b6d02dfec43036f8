"""What PEFT's ``adapter_config.json`` says of a LoRA, and what we do not take over, refused by name.

Shapes: R rank.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora.errors import AdapterError
from lora.peft_format import CONFIG_FILE

# Neither changes what the saved tensors compute, nor belongs to another kind of adapter.
_HARMLESS = (
    "peft_type", "auto_mapping", "peft_version", "task_type", "inference_mode", "base_model_name_or_path", "revision",
    "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules",
    "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core", "eva_config",
    "qalora_group_size", "runtime_config", "ensure_weight_tying",
)  # fmt: skip
# How they start changes no base weight; others (PiSSA, OLoRA, LoftQ, CorDA, LoRA-GA) leave a base of their own behind.
_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
_NAMES = {"use_dora": "DoRA", "modules_to_save": "fully trained modules", "trainable_token_indices": "trained tokens"}


@dataclass(frozen=True)
class PeftConfig:
    """One LoRA as PEFT describes it.

    Attributes:
        version: that wrote it, as (major, minor); None if the file does not say, as before 0.18.
        parameters: ``target_parameters``.
    """

    r: int
    alpha: float
    dropout: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    version: tuple[int, int] | None
    parameters: tuple[str, ...]

    def r_of(self, key: str) -> int:
        """Of the module or parameter at ``key``."""
        return int(_matched(self.rank_pattern, key, self.r))

    def alpha_of(self, key: str) -> float:
        return float(_matched(self.alpha_pattern, key, self.alpha))

    def scale_of(self, key: str) -> float:
        return self.alpha_of(key) / (math.sqrt(self.r_of(key)) if self.rslora else self.r_of(key))


def read_peft_config(folder: Path, version: str | None = None) -> PeftConfig:
    """The configuration in ``folder``; ``version``: of the PEFT that wrote it, if it does not say.

    Raises AdapterError if there is none, if it is not of a LoRA, or for a feature that has no equal here, by its name.
    """
    file = folder / CONFIG_FILE
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise AdapterError(f"{folder} has no {CONFIG_FILE}; give a folder that PEFT's save_pretrained wrote") from None
    except (OSError, ValueError) as error:
        raise AdapterError(f"{file} cannot be read ({error}); save the adapter again") from error
    if not isinstance(found, dict) or found.get("peft_type") != "LORA":
        kind = found.get("peft_type") if isinstance(found, dict) else None
        raise AdapterError(f"{file} has peft_type {kind!r}; only LORA can be imported")
    _check_features(found, file)
    if version is not None and found.get("peft_version") not in (None, version):
        raise AdapterError(f"{file} says peft_version {found['peft_version']!r}; leave out --peft-version {version}")
    try:
        return PeftConfig(
            r=int(found.get("r", 8)),
            alpha=float(found.get("lora_alpha", 8)),
            dropout=float(found.get("lora_dropout") or 0.0),
            rslora=bool(found.get("use_rslora")),
            rank_pattern=dict(found.get("rank_pattern") or {}),
            alpha_pattern=dict(found.get("alpha_pattern") or {}),
            version=_version(found.get("peft_version") or version),
            parameters=tuple(found.get("target_parameters") or ()),
        )
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{file} has a value of another kind than PEFT writes ({error}); save it again") from error


def _check_features(found: Mapping[str, Any], file: Path) -> None:
    if found.get("bias", "none") != "none":
        raise AdapterError(f"{file}: bias={found['bias']!r} trains biases, which no bank has; it cannot be imported")
    if found.get("init_lora_weights", True) not in _STARTS:
        raise AdapterError(
            f"{file}: init_lora_weights={found['init_lora_weights']!r} changed the base's weights when it began; have "
            "PEFT save it for the unchanged base first (path_initial_model_for_weight_conversion)"
        )
    for key, value in found.items():
        if key in (*_HARMLESS, "bias", "init_lora_weights") or not value:
            continue
        if key.endswith("_config") and isinstance(value, dict) and not any(value.values()):
            continue
        what = f" ({_NAMES[key]})" if key in _NAMES else ""
        raise AdapterError(f"{file}: {key}={value!r}{what} has no equal in a bank; it cannot be imported")


def _version(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.match(r"(\d+)\.(\d+)", text)
    if found is None:
        raise AdapterError(f"{text!r} is no version of PEFT; give one as 0.17")
    return int(found[1]), int(found[2])


def _matched(pattern: Mapping[str, Any], key: str, default: Any) -> Any:
    """PEFT's own rule: the first entry that matches the end of the key, as a regular expression, counts."""
    for expression, value in pattern.items():
        if re.match(rf"(.*\.)?({expression})$", key):
            return value
    return default
