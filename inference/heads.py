"""Lookahead heads: what a layer's input tells of the experts that all layers will use next.

For each MoE layer two linear maps, H -> R -> 2*L*E, read the hidden states that its gate reads and give log odds that
an expert is used in its layer's next turn, and within its next four (:data:`inference.foresight.HORIZONS`). For layers
further down the next turn is in this token; for this layer and those above, in the next token.

Two linear maps per layer, distilled from the model's own routing, are the form of arXiv 2511.10676, which predicts a
layer's experts before its attention. It is cited for that form alone: its figures were not reproduced, and its models
not run. That each layer's heads answer for all layers and for two horizons, so that they guide eviction and not only
prefetch, is ours; what it is worth on models trained here is in docs/measurements.md.

Heads lie in an exported folder, under ``lookahead/``: ``lookahead.safetensors`` and ``lookahead.json``, its manifest
with their hash and the fingerprint of the weights that they were trained for. They are of no use to another model, and
reading refuses one.

Shapes: T tokens, H hidden, R rank, L MoE layers (by row), E experts, D layer calls ahead; O = 2 * L * E.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from inference.errors import InferenceError
from inference.foresight import HORIZONS
from inference.policies import Policy
from inference.recorded_heads import MAX_ROWS
from inference.rows import decoding
from moe.fingerprint import fingerprint

FOLDER, WEIGHTS, MANIFEST = "lookahead", "lookahead.safetensors", "lookahead.json"
FORMAT = 1


@dataclass(frozen=True)
class HeadsManifest:
    """What ``lookahead.json`` says.

    Attributes:
        layers: numbers of the MoE layers.
        base_fingerprint: of the weights the heads were trained for (:func:`moe.fingerprint.fingerprint`).
        sha256: of ``lookahead.safetensors``.
        training: what they were trained on, and how well they did on held-out text.
    """

    layers: tuple[int, ...]
    num_experts: int
    hidden: int
    rank: int
    base_fingerprint: str
    sha256: str
    horizons: tuple[int, ...] = HORIZONS
    format: int = FORMAT
    training: Mapping[str, Any] = field(default_factory=dict)


class Heads:
    """The maps, on one device.

    Args:
        inward_LHR: hidden states to codes.
        outward_LRO, bias_LO: codes to log odds, [2,L,E] flattened.
    """

    def __init__(self, inward_LHR: Tensor, outward_LRO: Tensor, bias_LO: Tensor, num_experts: int) -> None:
        self.layers, self.hidden, self.rank = inward_LHR.shape
        self.num_experts = num_experts
        outputs = len(HORIZONS) * self.layers * num_experts
        assert outward_LRO.shape == (self.layers, self.rank, outputs), outward_LRO.shape
        assert bias_LO.shape == (self.layers, outputs), bias_LO.shape
        self.inward_LHR, self.outward_LRO, self.bias_LO = inward_LHR, outward_LRO, bias_LO

    def to(self, device: torch.device | str) -> Heads:
        tensors = (t.to(device) for t in (self.inward_LHR, self.outward_LRO, self.bias_LO))
        return Heads(*tensors, self.num_experts)

    def codes(self, row: int, x_TH: Tensor) -> Tensor:
        """[T,R], in fp32."""
        return x_TH.reshape(-1, self.hidden).float() @ self.inward_LHR[row]

    def ahead(self, row: int, x_TH: Tensor) -> Tensor:
        """Log odds [2,L,E] of the call of layer ``row``, whose input is ``x_TH``.

        A few rows are sequences that are decoded together: an expert is used if any of them uses it. Many are a
        prompt, of which the last one tells what comes, unless the pass under way says otherwise.
        """
        x_TH = x_TH.reshape(-1, self.hidden)
        if len(x_TH) > MAX_ROWS and not decoding(len(x_TH)):
            x_TH = x_TH[-1:]
        z_TO = torch.addmm(self.bias_LO[row], self.codes(row, x_TH), self.outward_LRO[row])
        z_O = z_TO[0] if len(z_TO) == 1 else any_of(z_TO)
        return z_O.view(len(HORIZONS), self.layers, self.num_experts)

    def next_calls(self, row: int, x_TH: Tensor, lead: int = 1) -> Tensor:
        """Log odds [D,E] for the ``lead`` layer calls that follow, for :class:`inference.predictors.Lookahead`."""
        following = [(row + distance) % self.layers for distance in range(1, lead + 1)]
        return self.ahead(row, x_TH)[0, following]


def any_of(z_TO: Tensor) -> Tensor:
    """Log odds that at least one of independent events T happens."""
    none_O = torch.nn.functional.softplus(z_TO).sum(0)  # minus the logarithm of the chance that none does
    return torch.where(none_O > 30, none_O, none_O.clamp(min=1e-12).expm1().log())


def save_heads(heads: Heads, folder: str | Path, layers: tuple[int, ...], training: Mapping[str, Any]) -> HeadsManifest:
    """Put heads into an exported model folder, in place of earlier ones; the manifest is written last."""
    tensors = {"inward": heads.inward_LHR, "outward": heads.outward_LRO, "bias": heads.bias_LO}
    blob = save({name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()})
    manifest = HeadsManifest(
        layers=layers,
        num_experts=heads.num_experts,
        hidden=heads.hidden,
        rank=heads.rank,
        base_fingerprint=fingerprint(folder),
        sha256=hashlib.sha256(blob).hexdigest(),
        training=dict(training),
    )
    out = Path(folder) / FOLDER
    out.mkdir(exist_ok=True)
    (out / MANIFEST).unlink(missing_ok=True)
    (out / WEIGHTS).write_bytes(blob)
    written = out / f"{MANIFEST}.tmp"
    written.write_text(json.dumps(dataclasses.asdict(manifest), indent=1) + "\n")
    os.replace(written, out / MANIFEST)
    return manifest


def has_heads(folder: str | Path) -> bool:
    """Damaged ones, too, which :func:`load_heads` refuses: nobody who made heads expects to go on without them."""
    return (Path(folder) / FOLDER).exists()


def load_heads(folder: str | Path, device: torch.device | str = "cpu") -> tuple[Heads, HeadsManifest]:
    """The heads of a model folder. Reads all of its weights once, to make sure that they are the heads' own.

    Raises InferenceError if there are none, or if they are damaged or of another model.
    """
    home = Path(folder) / FOLDER
    try:
        fields = json.loads((home / MANIFEST).read_text())
        if fields.get("format") != FORMAT:
            raise InferenceError(
                f"{home / MANIFEST}: format {fields.get('format')}, this program reads {FORMAT}; train the heads again"
            )
        manifest = HeadsManifest(**fields | {name: tuple(fields[name]) for name in ("layers", "horizons")})
        blob = (home / WEIGHTS).read_bytes()
    except InferenceError:
        raise
    except OSError as error:
        raise InferenceError(
            f"{error.filename}: {error.strerror}; make heads with `planaria lookahead train RUN {folder}`, or take "
            f"{home} away"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InferenceError(f"{home / MANIFEST}: not the manifest of heads ({error}); train them again") from error
    if hashlib.sha256(blob).hexdigest() != manifest.sha256:
        raise InferenceError(
            f"{home / WEIGHTS} does not match its manifest's hash: it is damaged; train the heads again"
        )
    if fingerprint(folder) != manifest.base_fingerprint:
        raise InferenceError(
            f"{home}: these heads were trained for other weights than those in {folder}; train them for these: "
            f"`planaria lookahead train RUN {folder}`"
        )
    try:
        tensors = load(blob)
        heads = Heads(tensors["inward"], tensors["outward"], tensors["bias"], manifest.num_experts)
    except (SafetensorError, KeyError, AssertionError, ValueError) as error:
        raise InferenceError(f"{home / WEIGHTS}: not the weights of heads ({error}); train them again") from error
    if (heads.layers, heads.hidden, heads.rank) != (len(manifest.layers), manifest.hidden, manifest.rank):
        raise InferenceError(f"{home}: manifest and weights disagree; train the heads again")
    if manifest.horizons != HORIZONS:
        raise InferenceError(f"{home}: horizons {manifest.horizons}, this program uses {HORIZONS}; train them again")
    return heads.to(device), manifest


def tell_policy(heads: Heads, policy: Policy, experts: Sequence[nn.Module]) -> None:
    """Before every call of these modules, by row, the policy is told what heads see in its input.

    For experts in host memory. Behind a link the executor tells it, who reads back from the device anyway.
    """

    def hook(row: int) -> Callable[..., None]:
        def tell(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            x_TH = args[0] if args else kwargs["hidden_states"]
            policy.foresee(heads.ahead(row, x_TH).detach().numpy().astype(np.float64))

        return tell

    for row, module in enumerate(experts):
        module.register_forward_pre_hook(hook(row), with_kwargs=True)
