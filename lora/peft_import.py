"""An adapter folder from what PEFT 0.17 to 0.21 saved.

PEFT's files say less than is needed to read them: which tensor of the experts a key belongs to follows from how PEFT
nests its wrappers, and until 0.18 it took the output axis of a stacked weight for the input. Shapes are compared with
the base model's, and what they leave open is refused.

Shapes: E experts, R rank, M inputs, O outputs of a tensor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lora.config import BankConfig
from lora.errors import AdapterError
from lora.format import save_adapter
from lora.import_banks import Place, banks_for, native_tensors
from lora.methods import EXPERT_TENSORS
from lora.peft_config import PeftConfig, read_peft_config
from lora.peft_format import WEIGHTS_FILE, unpack_a, unpack_b
from moe.family_table import FAMILIES
from moe.fingerprint import fingerprint

_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
_APART = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)")
_SWAPPED_SINCE = (0, 19)


def import_adapter(
    peft: Path, out: Path, base: Path, *, expert_slowest: bool = False, peft_version: str | None = None
) -> dict[str, BankConfig]:
    """Write ``peft`` as an adapter folder, whole or not at all; returns its banks.

    Args:
        base: Hugging Face folder of the model that it was trained on.
        expert_slowest: lora_B of stacked experts is packed (O, E*R) instead of (O, R*E).
        peft_version: that wrote ``peft``, if its configuration does not say.
    Raises AdapterError for a feature, tensor or shape that cannot be taken over exactly, by its name.
    """
    config, base_fingerprint = read_peft_config(peft, peft_version), fingerprint_of(base)
    model = _skeleton(base)
    reader = _Reader(config, model, expert_slowest)
    places = reader.places(_pairs(peft))
    if expert_slowest and not reader.unpacked:
        raise AdapterError(
            f"{peft} has no stacked experts, whose lora_B could be packed in two ways; leave the layout out"
        )
    banks = banks_for(places, model, config)
    save_adapter(out, native_tensors(places, banks, model), banks, base_fingerprint, base_model=str(base))
    return banks


def fingerprint_of(base: Path) -> str:
    """Raises AdapterError if ``base`` is no model's folder."""
    if not (base / "config.json").is_file():
        raise AdapterError(f"{base} has no config.json; give the Hugging Face folder of the model it was trained on")
    try:
        return fingerprint(base)
    except ValueError as error:
        raise AdapterError(str(error)) from error


def _skeleton(base: Path) -> PreTrainedModel:
    """The base model without its weights."""
    try:
        config = AutoConfig.from_pretrained(base)
        with init_empty_weights():
            return AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{base}: transformers cannot make its model: {error}") from error


def _pairs(folder: Path) -> dict[str, dict[str, Tensor]]:
    """A and B by PEFT's key."""
    file = folder / WEIGHTS_FILE
    try:
        tensors = load_file(file)
    except FileNotFoundError:
        raise AdapterError(f"{folder} has no {WEIGHTS_FILE}; have PEFT save it with safe_serialization=True") from None
    except SafetensorError as error:
        raise AdapterError(f"{file} is damaged ({error}); save the adapter again") from error
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or tensor.dim() != 2:
            raise AdapterError(f"{file}: {key} is no factor of a LoRA on a matrix; it cannot be imported")
        pairs.setdefault(match[1], {})[match[2]] = tensor
    for key, pair in pairs.items():
        for factor in "AB":
            if factor not in pair:
                raise AdapterError(f"{file}: {key} has no lora_{factor}; save the adapter again")
    if not pairs:
        raise AdapterError(f"{file} holds no tensor; save the adapter again")
    return pairs


@dataclass(frozen=True)
class _Stacked:
    """One stacked tensor of a model's experts: E, O and M whatever order it has them in."""

    experts: int
    out: int
    into: int
    transposed: bool

    @classmethod
    def of(cls, module: nn.Module, name: str) -> _Stacked:
        shape = tuple(getattr(module, name).shape)
        transposed = bool(getattr(module, "is_transposed", False))
        return cls(shape[0], *(shape[:0:-1] if transposed else shape[1:]), transposed)


class _Reader:
    def __init__(self, config: PeftConfig, model: PreTrainedModel, expert_slowest: bool) -> None:
        self.config, self.expert_slowest, self.unpacked = config, expert_slowest, 0
        self.modules = dict(model.named_modules())
        self.family = FAMILIES.get(model.config.model_type)

    def places(self, pairs: Mapping[str, Mapping[str, Tensor]]) -> list[Place]:
        """What each pair of factors adapts. Raises AdapterError naming the first that nothing in the model is."""
        found: list[Place] = []
        apart: dict[tuple[str, str], dict[int, Mapping[str, Tensor]]] = {}
        for key, pair in pairs.items():
            if match := _APART.fullmatch(key):
                apart.setdefault((self._place(match[1]), match[3]), {})[int(match[2])] = pair
            elif isinstance(self.modules.get(self._place(key)), nn.Linear):
                found.append(self._linear(self._place(key), key, pair))
            else:
                found.append(self._stacked(key, pair, pairs))
        return found + self._fused(apart)

    def _place(self, key: str) -> str:
        """Our path of a module: files of some families call its block otherwise."""
        if self.family is None:
            return key
        return key.replace(f".{self.family.block_on_disk}.", ".mlp.")

    def _linear(self, place: str, key: str, pair: Mapping[str, Tensor]) -> Place:
        module, (a, b) = self.modules[place], (pair["A"], pair["B"])
        if a.shape[1] != module.in_features or b.shape != (module.out_features, a.shape[0]):
            raise self._misfit(key, pair, f"a linear layer [{module.out_features}, {module.in_features}]")
        parameter = f"{place}.weight"
        known = parameter if any(f".{parameter}".endswith(f".{name}") for name in self.config.parameters) else place
        self._check_rank(known, a.shape[0])
        return Place("linear", place, "weight", a.unsqueeze(0), b.unsqueeze(0), self.config.scale_of(known))

    def _stacked(self, key: str, pair: Mapping[str, Tensor], pairs: Mapping[str, object]) -> Place:
        inner = key.removesuffix(".base_layer")
        place = self._place(inner)
        module = self.modules.get(place)
        if inner.endswith(".experts.base_layer"):
            raise AdapterError(f"{key}: three wrappers around one module; biases of experts cannot be imported")
        if not all(isinstance(getattr(module, name, None), nn.Parameter) for name in EXPERT_TENSORS):
            raise AdapterError(f"the tensors {key}.lora_* adapt nothing that the base model has; is it another base?")
        if inner != key or f"{key}.base_layer" in pairs:
            name = EXPERT_TENSORS[0] if inner != key else EXPERT_TENSORS[1]
        else:
            name = self._single(place)
        parameter = f"{place}.{name}"
        a, b = self._unpacked(parameter, pair, _Stacked.of(module, name))
        self._check_rank(parameter, a.shape[1])
        return Place("experts", place, name, a, b, self.config.scale_of(parameter))

    def _single(self, place: str) -> str:
        """The one tensor of the experts that is adapted: the configuration says which."""
        named = [
            name
            for name in EXPERT_TENSORS
            if any(f".{place}.{name}".endswith(f".{target}") for target in self.config.parameters)
        ]
        if len(named) != 1:
            raise AdapterError(
                f"{place} has one pair of factors, and target_parameters {', '.join(named) or 'none'} of it; which "
                "tensor they adapt cannot be told"
            )
        return named[0]

    def _unpacked(self, name: str, pair: Mapping[str, Tensor], weight: _Stacked) -> tuple[Tensor, Tensor]:
        """A [E,R,M] and B [E,O,R] of the stacked tensor."""
        a_XM, b_OX = pair["A"], pair["B"]
        if a_XM.shape[0] % weight.experts or a_XM.shape[0] != b_OX.shape[1]:
            raise self._misfit(name, pair, f"{weight.experts} experts")
        self.unpacked += 1
        a, b = unpack_a(a_XM, weight.experts), unpack_b(b_OX, weight.experts, expert_slowest=self.expert_slowest)
        if not self._is_turned(name, pair, weight):
            return a, b
        # Such a file holds the update's transpose: what it calls A faces the outputs.
        return b.transpose(1, 2).contiguous(), a.transpose(1, 2).contiguous()

    def _is_turned(self, name: str, pair: Mapping[str, Tensor], weight: _Stacked) -> bool:
        """Whether PEFT took the outputs for inputs, as it did before 0.19 where experts are [E, out, in]."""
        sides = (pair["A"].shape[1], pair["B"].shape[0])
        straight, turned = sides == (weight.into, weight.out), sides == (weight.out, weight.into)
        if not straight and not turned:
            raise self._misfit(name, pair, f"experts [{weight.experts}, {weight.out}, {weight.into}]")
        if straight and turned:
            if weight.transposed:
                return False
            if self.config.version is None:
                raise AdapterError(
                    f"{name} has as many inputs as outputs, and adapter_config.json has no peft_version: PEFT before "
                    "0.19 wrote the transpose, and nothing tells which this is; give --peft-version"
                )
            return self.config.version < _SWAPPED_SINCE
        return turned

    def _fused(self, apart: Mapping[tuple[str, str], Mapping[int, Mapping[str, Tensor]]]) -> list[Place]:
        """Stacked tensors from each expert's matrices: gate and up in one."""
        names = self.family.expert_names if self.family is not None else None
        found = []
        for place in dict.fromkeys(place for place, _ in apart):
            module = self.modules.get(place)
            if names is None or not isinstance(getattr(module, EXPERT_TENSORS[0], None), nn.Parameter):
                raise AdapterError(
                    f"the base model has no experts {place}, to which tensors belong; is it another base?"
                )
            here = {name: pairs for (other, name), pairs in apart.items() if other == place}
            if unknown := sorted(here.keys() - set(names)):
                raise AdapterError(
                    f"{place}: experts of this family have no {unknown[0]}; they have {', '.join(names)}"
                )
            halves = [name for name in names[:2] if name in here]
            if len(halves) == 1:
                raise AdapterError(f"{place}: {halves[0]} is adapted alone, and gate and up are one tensor here")
            for tensor, parts in zip(EXPERT_TENSORS, (names[:2], names[2:]), strict=True):
                if parts[0] in here:
                    stacks = [self._stack(place, name, here[name], module) for name in parts]
                    found.append(self._joined(place, tensor, stacks))
        return found

    def _stack(self, place: str, name: str, pairs: Mapping[int, Mapping[str, Tensor]], module: nn.Module) -> Place:
        """One matrix of all experts."""
        experts = getattr(module, EXPERT_TENSORS[0]).shape[0]
        if missing := sorted(set(range(experts)) ^ pairs.keys()):
            raise AdapterError(
                f"{place}.{missing[0]}.{name}: experts 0 to {experts - 1} must all have a pair of factors"
            )
        block = self.family.block_on_disk if self.family is not None else "mlp"
        on_disk = place.replace(".mlp.", f".{block}.")
        keys = [f"{on_disk}.{expert}.{name}" for expert in range(experts)]
        facts = {(self.config.scale_of(key), tuple(pairs[e]["A"].shape)) for e, key in enumerate(keys)}
        if len(facts) != 1:
            raise AdapterError(f"{place}: its experts' {name} have different ranks or scales; they are one tensor here")
        for expert, key in enumerate(keys):
            self._check_rank(key, pairs[expert]["A"].shape[0])
        a, b = (torch.stack([pairs[e][factor] for e in range(experts)]) for factor in "AB")
        return Place("experts", place, name, a, b, self.config.scale_of(keys[0]))

    def _joined(self, place: str, tensor: str, parts: list[Place]) -> Place:
        weight = _Stacked.of(self.modules[place], tensor)
        if len(parts) == 1:
            joined = replace(parts[0], tensor=tensor)
        else:
            gate, up = parts
            if gate.scale != up.scale:
                raise AdapterError(f"{place}: gate and up have different scales, and they are one tensor here")
            if torch.equal(gate.a, up.a):
                joined = replace(gate, tensor=tensor, b=torch.cat([gate.b, up.b], 1))
            else:
                joined = replace(gate, tensor=tensor, a=torch.cat([gate.a, up.a], 1), b=_block_diagonal(gate.b, up.b))
        if joined.a.shape[2] != weight.into or joined.b.shape[1] != weight.out:
            shapes = f"{tuple(joined.a.shape)} and {tuple(joined.b.shape)}"
            raise AdapterError(f"{place}.{tensor}: factors {shapes} are not of experts [{weight.out}, {weight.into}]")
        return joined

    def _check_rank(self, key: str, r: int) -> None:
        told = self.config.r_of(key)
        if told != r:
            raise AdapterError(f"{key} has rank {r}, adapter_config.json says {told}; the scale would be a guess")

    def _misfit(self, key: str, pair: Mapping[str, Tensor], what: str) -> AdapterError:
        shapes = ", ".join(f"lora_{factor} {tuple(tensor.shape)}" for factor, tensor in pair.items())
        return AdapterError(f"{key}: {shapes} do not fit {what}; is it another base model?")


def _block_diagonal(*parts_EOR: Tensor) -> Tensor:
    return torch.stack([torch.block_diag(*matrices) for matrices in zip(*parts_EOR, strict=True)])
