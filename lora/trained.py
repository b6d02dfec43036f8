"""Banks whose experts are trained adapters: from the adapters' folders to the factors that the bank holds.

An expert keeps its own function whatever the bank's scale and rank are: its B is multiplied by the quotient of the two
scales, and missing ranks are zero.

Shapes: E adapters, R rank of the bank, Q rank of one adapter, M inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora.config import BankConfig
from lora.deltas import Delta, deltas_of, summed
from lora.errors import AdapterError
from lora.exactness import obstacles
from lora.format import Adapter, load_adapter
from lora.presets import bank_at, expand, matches


def frozen_tensors(
    banks: Mapping[str, BankConfig], base_fingerprint: str | None = None, loaded: Mapping[str, Adapter] | None = None
) -> dict[str, Tensor]:
    """What the banks hold and do not train, by parameter path: A, B, and Arrow's directions. Empty if all is trained.

    Args:
        base_fingerprint: of the model they are for, if known; every adapter must have been trained on it.
        loaded: adapters by the folders that the banks name; read from there by default.

    Raises AdapterError for a folder that is no adapter, for one that is not exactly LoRA on linear layers, that was
    trained on another base, that lacks a place which others of its bank have, or has one that no bank takes up.
    """
    found: dict[str, Tensor] = {}
    frozen = {name: expand(bank) for name, bank in banks.items() if bank.adapters}
    folders = dict.fromkeys(folder for bank in frozen.values() for folder in bank.adapters)
    updates = {}
    for folder in folders:
        adapter = loaded[folder] if loaded else load_adapter(folder)
        updates[folder] = _updates(folder, adapter, base_fingerprint)
    for name, bank in frozen.items():
        mine = [_of_bank(updates[folder], name, banks) for folder in bank.adapters]
        for place in sorted(set().union(*mine)):
            for folder, those in zip(bank.adapters, mine, strict=True):
                if place not in those:
                    raise AdapterError(
                        f"adapter.{name}: {folder} does not adapt {place}, and others of its adapters do; give "
                        "adapters of the same layers, or targets that all of them adapt"
                    )
            found |= _stacked(name, bank, place, [those[place] for those in mine])
    for folder, those in updates.items():
        users = {name: banks[name] for name, bank in frozen.items() if folder in bank.adapters}
        if lost := [place for place in those if _owner(place, banks) not in users]:
            raise AdapterError(
                f"{folder} adapts {lost[0]}, which is no target of adapter.{' or adapter.'.join(users)}; add it to "
                "targets, for without it the adapter would be another function"
            )
    return found


def fill(model: nn.Module, banks: Mapping[str, BankConfig], base_fingerprint: str | None = None) -> None:
    """Load what :func:`frozen_tensors` gives into ``model``, to which ``banks`` are attached.

    Raises AdapterError as that does, and if the model has other places or sizes than the adapters.
    """
    tensors = frozen_tensors(banks, base_fingerprint)
    for path, parameter in model.named_parameters():
        if ".adapter." not in path or parameter.requires_grad:
            continue
        place = path.rpartition(".adapter.")[0]
        name = _owner(place, banks)
        if name is None or not banks[name].adapters:
            continue
        tensor = tensors.pop(path, None)
        if tensor is None:
            raise AdapterError(
                f"adapter.{name}: none of its adapters adapts {place}, which its targets name; give targets that they "
                "adapt"
            )
        if tensor.shape != parameter.shape:
            raise AdapterError(
                f"adapter.{name}: its adapters have {tuple(tensor.shape)} at {path}, the model needs "
                f"{tuple(parameter.shape)}; give adapters of this model"
            )
        with torch.no_grad():
            parameter.copy_(tensor)
    if tensors:
        raise AdapterError(f"the model has no place for {next(iter(tensors))}; give adapters of this model")


def arrow_of(folders: tuple[str, ...], top_k: int, temperature: float) -> tuple[dict[str, Tensor], BankConfig, str]:
    """Tensors, bank and base fingerprint of an adapter that is Arrow over the adapters in ``folders``.

    Raises AdapterError as :func:`frozen_tensors` does, and if they were trained on different bases.
    """
    loaded = {folder: load_adapter(folder) for folder in folders}
    base = next(iter(loaded.values())).base_fingerprint
    targets = dict.fromkeys(
        target for adapter in loaded.values() for bank in adapter.banks.values() for target in expand(bank).targets
    )
    largest = max((d.r for folder, one in loaded.items() for d in _updates(folder, one, base).values()), default=1)
    bank = BankConfig("arrow", tuple(targets), adapters=folders, r=largest, top_k=top_k, temperature=temperature)
    return frozen_tensors({"arrow": bank}, base, loaded), bank, base


def principal_direction(a_QM: Tensor, b_OQ: Tensor) -> Tensor:
    """The right singular vector [M] of ``B A`` for its largest singular value, in fp64, of length 1.

    By QR of both factors and the SVD of a [Q, Q] matrix: ``B A`` is never built. Of the two signs the one whose largest
    entry is positive.
    """
    base_MQ, upper_QQ = torch.linalg.qr(a_QM.double().T)
    _, left_QQ = torch.linalg.qr(b_OQ.double())
    _, _, vh_QQ = torch.linalg.svd(left_QQ @ upper_QQ.T)
    v_M = base_MQ @ vh_QQ[0]
    return v_M * v_M[v_M.abs().argmax()].sign()


def _updates(folder: str, adapter: Adapter, base_fingerprint: str | None) -> dict[str, Delta]:
    """The adapter's updates by place."""
    if base_fingerprint is not None and adapter.base_fingerprint != base_fingerprint:
        raise AdapterError(
            f"{folder} was trained on base {adapter.base_fingerprint}, this is {base_fingerprint}; give adapters of "
            "one base model"
        )
    if why := obstacles(adapter.banks)["merged"]:
        raise AdapterError(f"{folder} cannot be an expert: {why}; give adapters that are exactly LoRA")
    for name, bank in adapter.banks.items():
        if expand(bank).site != "linear":
            raise AdapterError(
                f"{folder} cannot be an expert: adapter.{name} is on {expand(bank).site}; give "
                "adapters of linear layers"
            )
    return {delta.place: summed(delta) for delta in deltas_of(adapter.tensors, adapter.banks, owners=adapter.owners)}


def _of_bank(updates: Mapping[str, Delta], name: str, banks: Mapping[str, BankConfig]) -> dict[str, Delta]:
    return {place: delta for place, delta in updates.items() if _owner(place, banks) == name}


def _owner(place: str, banks: Mapping[str, BankConfig]) -> str | None:
    """The bank that has the linear layer ``place`` as a target; targets of other sites name other modules."""
    linear = {name: full for name, bank in banks.items() if (full := expand(bank)).site == "linear"}
    return next((name for name, full in linear.items() if any(matches(t, place) for t in full.targets)), None)


def _stacked(name: str, bank: BankConfig, place: str, deltas: list[Delta]) -> dict[str, Tensor]:
    here = bank_at(bank, 0, 1)
    largest = max(delta.r for delta in deltas)
    if largest > here.r:
        raise AdapterError(f"adapter.{name}: r={here.r} is less than an adapter's rank {largest}; write r: {largest}")
    a_ERM, b_EOR, v_EM = [], [], []
    for folder, delta in zip(bank.adapters, deltas, strict=True):
        a_QM, b_OQ = delta.a_ERM[0].float(), delta.b_EOR[0].float()
        lacking = here.r - delta.r
        a_ERM.append(F.pad(a_QM, (0, 0, 0, lacking)))
        b_EOR.append(F.pad(b_OQ * (delta.scale / here.scale), (0, lacking)))
        if bank.score == "arrow":
            if not (b_OQ.any() and a_QM.any()):
                raise AdapterError(
                    f"adapter.{name}: {folder} is zero at {place} and so has no direction; give trained adapters"
                )
            v_EM.append(principal_direction(a_QM, b_OQ).float())
    at = f"{place}.adapter."
    found = {f"{at}A": torch.stack(a_ERM), f"{at}B": torch.stack(b_EOR)}
    return found | ({f"{at}router.weight": torch.stack(v_EM)} if v_EM else {})
