"""Checks of a Hugging Face folder that need no model in memory: tensors are read one at a time.

transformers fills what a folder lacks with random numbers, and only warns; here every tensor of the model must have
come from the files, with its shape.

Shapes: E experts.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from moe.refs import ExpertRef
from trainer.doctor_report import Report

_EXPERT = re.compile(r"\.(\d+)\.[\w.]*?\bexperts\.(\d+)\.(\w+?)(?:\.weight)?$")
_STACKED = re.compile(r"\.(\d+)\.[\w.]*?\bexperts\.(\w+)$")
_ROUTER = re.compile(r"\.(\d+)\.[\w.]*?\b(?:gate|router)\.weight$")
_BIAS = re.compile(r"correction_bias$")
_SIGMAS = 4.0  # of a statistic of fresh weights; one in 16,000 goes further


class DoctorError(ValueError):
    """The doctor cannot look at this model; the message says why and what to do."""


@dataclass(frozen=True)
class Statistics:
    """Of one matrix of one expert. ``excess``: kurtosis less that of a normal distribution."""

    size: int
    mean: float
    std: float
    excess: float

    @classmethod
    def of(cls, matrix: Tensor) -> Statistics:
        x = matrix.double().flatten()
        mean, std = float(x.mean()), float(x.std(correction=0))
        excess = float((((x - mean) / std) ** 4).mean()) - 3 if std > 0 else 0.0
        return cls(x.numel(), mean, std, excess)

    def is_fresh(self, initial_std: float) -> bool:
        """Whether independent draws from N(0, initial_std) look like this."""
        n = self.size
        return (
            abs(self.std / initial_std - 1) * math.sqrt(2 * n) < _SIGMAS
            and abs(self.mean) * math.sqrt(n) / initial_std < _SIGMAS
            and abs(self.excess) / math.sqrt(24 / n) < _SIGMAS + 1
        )

    def distance(self, initial_std: float) -> float:
        return abs(math.log(self.std / initial_std)) if self.std > 0 else math.inf


@dataclass
class _Scan:
    """What the pass over all tensors keeps, by (layer, expert) and by tensor name."""

    statistics: dict[tuple[int, int], dict[str, Statistics]]
    digests: dict[tuple[int, str], dict[str, list[int]]]


def check_folder(folder: Path, model: nn.Module, report: Report) -> bool:
    """Run all checks of the files. ``model`` is the folder's model on the meta device.

    Returns whether the model can be loaded as it is meant. Raises DoctorError if there are no safetensors files.
    """
    files = _open(folder)
    whole = _check_names(files, model, report)
    scan = _Scan(defaultdict(dict), defaultdict(lambda: defaultdict(list)))
    config: Any = model.config
    for name, tensor in _tensors(files):
        _look(name, tensor, scan, report)
    report.passed("numbers", f"all values of {len(files)} tensors are finite")
    report.passed("routers", "no router gives all experts the same score; correction biases are fp32")
    _check_duplicates(scan, report)
    _check_fresh(scan, float(getattr(config, "initializer_range", 0.02)), report)
    return whole and not report.has_failed("numbers")


def _open(folder: Path) -> dict[str, Path]:
    """The file of each tensor."""
    index = folder / "model.safetensors.index.json"
    paths = sorted(folder.glob("*.safetensors"))
    if index.is_file():
        try:
            paths = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DoctorError(f"{index} is no index of safetensors ({error!r}); copy it again") from None
    if not paths:
        raise DoctorError(f"{folder} has no *.safetensors file; save the model with transformers' save_pretrained")
    found: dict[str, Path] = {}
    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                found.update(dict.fromkeys(file.keys(), path))
        except FileNotFoundError:
            raise DoctorError(f"{path} is named in {index.name} and is not there; copy the folder again") from None
        except (SafetensorError, OSError) as error:
            raise DoctorError(f"{path} cannot be read ({error}); copy it again") from None
    return found


def _tensors(files: dict[str, Path]) -> Iterator[tuple[str, Tensor]]:
    for path in dict.fromkeys(files.values()):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)


def place_of_tensor(name: str) -> str:
    """``L01.E003.up_proj`` for a tensor of one expert, else its own name."""
    match = _EXPERT.search(name)
    return f"{ExpertRef(int(match[1]), int(match[2]))}.{match[3]}" if match else name


def digests(named: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """A checksum of every tensor, of stacked experts' one for each: two loaders of one folder must agree on all."""
    found: dict[str, str] = {}
    for name, tensor in named:
        stacked = _STACKED.search(name)
        parts = {name: tensor}
        if stacked:
            layer, rest = int(stacked[1]), stacked[2]
            parts = {f"{ExpertRef(layer, e)}.{rest}": part for e, part in enumerate(tensor.unbind(0))}
        found.update({place: _digest(part) for place, part in parts.items()})
    return found


def _digest(tensor: Tensor) -> str:
    return xxhash.xxh3_128_hexdigest(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())


def _check_names(files: dict[str, Path], model: Any, report: Report) -> bool:
    state = model.state_dict()
    expected = {name: tuple(t.shape) for name, t in revert_weight_conversion(model, dict(state)).items()}
    if len(files.keys() & state.keys()) > len(files.keys() & expected.keys()):
        expected = {name: tuple(t.shape) for name, t in state.items()}  # saved as it is in memory
    tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    for name in sorted(expected.keys() - files.keys() - tied):
        report.failed(
            "files", place_of_tensor(name), f"{name} is in no file",
            "transformers would fill it with random numbers; convert or copy the folder again",
        )  # fmt: skip
    for name in sorted(files.keys() - expected.keys() - tied):
        if not any(re.search(pattern, name) for pattern in ignored):
            report.failed(
                "files", place_of_tensor(name), f"{name} in {files[name].name} belongs to no tensor of the model",
                "it would be left out; compare its name with config.json's family and sizes",
            )  # fmt: skip
    for name in sorted(expected.keys() & files.keys()):
        with safe_open(files[name], "pt") as file:
            shape = tuple(file.get_slice(name).get_shape())
        if shape != expected[name]:
            report.failed(
                "files", place_of_tensor(name), f"{name} has shape {shape}, the model {expected[name]}",
                "two tensors were exchanged, or config.json is of another model",
            )  # fmt: skip
    report.passed("files", f"all {len(expected)} tensors of the model are there, with their shapes, and no others")
    return not report.has_failed("files")


def _look(name: str, tensor: Tensor, scan: _Scan, report: Report) -> None:
    if not tensor.is_floating_point():
        return
    finite = tensor.isfinite() if tensor.element_size() > 1 else torch.ones(1, dtype=torch.bool)
    one, stacked, router = _EXPERT.search(name), _STACKED.search(name), _ROUTER.search(name)
    if one:
        _look_at_expert(int(one[1]), int(one[2]), one[3], tensor, scan)
    elif stacked:
        for e, part in enumerate(tensor.unbind(0)):
            _look_at_expert(int(stacked[1]), e, stacked[2], part, scan)
    elif router and tensor.dim() == 2 and tensor.shape[0] > 1 and bool((tensor == tensor[:1]).all()):
        report.failed(
            "routers", name, f"all {tensor.shape[0]} rows are the same{' (zero)' * (not bool(tensor.any()))}",
            "every token would go to the same experts, or to arbitrary ones; the router was not loaded or trained",
        )  # fmt: skip
    if _BIAS.search(name) and tensor.dtype != torch.float32:
        report.failed(
            "routers", name, f"the correction bias is {str(tensor.dtype).removeprefix('torch.')}",
            "its steps of about 0.001 are lost to rounding; keep it in float32",
        )  # fmt: skip
    if not bool(finite.all()):
        where = place_of_tensor(name)
        if stacked:
            first = int((~finite).flatten(1).any(1).nonzero()[0])
            where = f"{ExpertRef(int(stacked[1]), first)}.{stacked[2]}"
        count = int((~finite).sum())
        report.failed(
            "numbers",
            where,
            f"{count} of {tensor.numel()} values are NaN or infinite",
            "go back to an older checkpoint",
        )


def _look_at_expert(layer: int, expert: int, tensor: str, matrix: Tensor, scan: _Scan) -> None:
    if matrix.dim() < 2:
        return
    scan.digests[layer, tensor][_digest(matrix)].append(expert)
    if bool(matrix.isfinite().all()):
        scan.statistics[layer, expert][tensor] = Statistics.of(matrix)


def _check_duplicates(scan: _Scan, report: Report) -> None:
    for (layer, tensor), experts_of in sorted(scan.digests.items()):
        for experts in experts_of.values():
            if len(experts) > 1:
                names = ", ".join(str(ExpertRef(layer, e)) for e in sorted(experts))
                report.failed(
                    "duplicates", f"{ExpertRef(layer, min(experts))}.{tensor}", f"is the same, bit for bit, in {names}",
                    "a converter wrote one expert twice; or an upcycled model needs noise, or its copies stay alike",
                )  # fmt: skip
    report.passed("duplicates", "no two experts of a layer are the same")


def _check_fresh(scan: _Scan, initial_std: float, report: Report) -> None:
    """Experts that look freshly initialised beside siblings that do not."""
    layers: dict[int, dict[int, dict[str, Statistics]]] = defaultdict(dict)
    for (layer, expert), tensors in scan.statistics.items():
        layers[layer][expert] = tensors
    untouched = 0
    for layer, experts in sorted(layers.items()):
        fresh = [e for e, tensors in experts.items() if all(s.is_fresh(initial_std) for s in tensors.values())]
        others = [max(s.distance(initial_std) for s in t.values()) for e, t in experts.items() if e not in fresh]
        if not others:
            untouched += 1
            continue
        noise = _SIGMAS / math.sqrt(2 * min(s.size for tensors in experts.values() for s in tensors.values()))
        # A layer that has hardly been trained has experts on both sides of any line.
        if median(others) < max(0.1, 3 * noise):
            continue
        for expert in sorted(fresh):
            report.failed(
                "random init", str(ExpertRef(layer, expert)),
                f"its weights are like fresh ones (normal, standard deviation {initial_std:g}), those of "
                f"{len(others)} siblings are not", "it was not loaded, or no token ever trained it; load it again",
            )  # fmt: skip
    note = "" if untouched == 0 else f" (all experts of {untouched} layers are fresh: a new model)"
    report.passed("random init", f"no expert is freshly initialised beside trained ones{note}")
