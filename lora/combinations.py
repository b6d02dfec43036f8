"""Which fields of a bank mean anything together, and which combinations there are (no torch here).

Everything here is about expanded banks (:func:`lora.presets.expand`). Findings are pairs of a field and a sentence that
begins with the field's name and ends with what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from fnmatch import fnmatchcase
from typing import Any

from lora.config import BankConfig, Count
from lora.methods import EXPERT_TENSORS

Finding = tuple[str, str]

_ROUTERS = {
    "linear": ("none", "token", "task", "prompt"),
    "experts": ("base",),
    "ffn": ("token", "task"),
    "parallel": ("none", "base", "token", "task"),
}
_COMBINES = {
    "none": ("static", "sum"),
    "base": ("top_k",),
    "token": ("soft", "top_k", "top_p", "threshold", "switch"),
    "task": ("soft", "top_k"),
    "prompt": ("soft", "top_k"),
}
_SHARES = {"linear": ("none", "A"), "experts": ("none", "all", "outer"), "ffn": ("none",), "parallel": ("none", "A")}


def _own(full: BankConfig) -> bool:
    return full.router in ("token", "task")


def _weighs(full: BankConfig) -> bool:
    return _own(full) or full.router == "prompt"


def _trains_factors(full: BankConfig) -> bool:
    return full.kind == "lowrank" and not full.adapters


def _chosen(full: BankConfig) -> bool:
    return full.router == "token" and full.site in ("linear", "parallel") and full.combine in ("top_k", "switch")


# Of fields that only mean something beside certain others: when, and in words.
_NEEDS: dict[str, tuple[Callable[[BankConfig], bool], str]] = {
    "num_experts": (
        lambda full: _own(full) or full.combine == "sum",
        "a bank with a router of its own, or combine: sum",
    ),
    "adapters": (lambda full: bool(full.adapters), "a bank with trained adapters for experts"),
    "r": (lambda full: full.kind == "lowrank", "kind: lowrank"),
    "rank_rule": (_trains_factors, "kind: lowrank without adapters"),
    "alpha": (_trains_factors, "kind: lowrank without adapters, which keep their scale"),
    "scaling": (_trains_factors, "kind: lowrank without adapters, which keep their scale"),
    "dropout": (lambda full: full.kind == "lowrank", "kind: lowrank"),
    "a_init": (_trains_factors, "kind: lowrank without adapters"),
    "router_init": (
        lambda full: _weighs(full) and full.score != "arrow",
        "router: token, task or prompt, and a score that trains",
    ),
    "task_embedding": (lambda full: full.router == "task", "router: task"),
    "num_tasks": (lambda full: full.router == "task", "router: task"),
    "score": (lambda full: full.router == "token", "router: token"),
    "temperature": (
        lambda full: full.router == "token" and full.score != "linear",
        "router: token and score: arrow, outputs or states",
    ),
    "jitter": (lambda full: full.router == "token", "router: token"),
    "top_k": (lambda full: _weighs(full) and full.combine == "top_k", "a router of the bank's own and combine: top_k"),
    "renormalise": (
        lambda full: _weighs(full) and full.combine in ("top_k", "top_p"),
        "a router of the bank's own and combine: top_k or top_p",
    ),
    "top_p": (lambda full: full.combine == "top_p", "combine: top_p"),
    "capacity": (lambda full: full.combine == "switch", "combine: switch"),
    "max_threshold": (lambda full: full.combine == "threshold", "combine: threshold"),
    "router_aux_loss_coef": (lambda full: full.balance != "none", "balance: switch or localized_cv2"),
    "balance_pooled": (lambda full: full.balance in ("switch", "product"), "balance: switch or product"),
    "localized_delta": (lambda full: full.balance == "localized_cv2", "balance: localized_cv2"),
    "z_loss_coef": (lambda full: full.router == "token", "router: token"),
    "contrastive_coef": (_chosen, "site: linear or parallel, router: token and combine: top_k or switch"),
    "contrastive_temperature": (lambda full: _chosen(full) and bool(full.contrastive_coef), "contrastive_coef above 0"),
}


def used_fields(full: BankConfig) -> tuple[str, ...]:
    """The fields that have an effect in an expanded bank, in their order; the others are ignored.

    >>> from lora.presets import expand
    >>> [name for name in used_fields(expand(BankConfig("mola"))) if "top" in name or name == "capacity"]
    ['top_k']
    """
    return tuple(f.name for f in fields(full) if f.name not in _NEEDS or _NEEDS[f.name][0](full))


def idle(full: BankConfig, given: Iterable[str]) -> Iterator[Finding]:
    """Those of the ``given`` fields that have no effect."""
    used = used_fields(full)
    for name in given:
        if name not in used:
            yield name, f"{name} has no effect here: it belongs to {_NEEDS[name][1]}; remove it"


def faults(full: BankConfig) -> Iterator[Finding]:
    """What no model can carry: values out of range, and fields that contradict each other."""
    found = [*_ranges(full), *_choices(full), *_kinds(full), *_trained(full), *_prompted(full)]
    yield from found or (*_losses(full), *_counts(full))


def shown(value: Any) -> str:
    """A value as it stands in a recipe."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(shown, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


_AT_LEAST_1 = ("num_experts", "r", "top_k", "task_embedding", "num_tasks")
_MORE_THAN_0 = ("alpha", "capacity", "temperature", "contrastive_temperature")
_AT_LEAST_0 = ("router_aux_loss_coef", "z_loss_coef", "contrastive_coef")
_BELOW_1 = ("dropout", "jitter")


def _ranges(full: BankConfig) -> Iterator[Finding]:
    used = used_fields(full)
    bounds: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
        (_AT_LEAST_1, lambda value: value >= 1, "at least 1"),
        (_MORE_THAN_0, lambda value: value > 0, "more than 0"),
        (_AT_LEAST_0, lambda value: value >= 0, "at least 0"),
        (_BELOW_1, lambda value: 0 <= value < 1, "at least 0 and less than 1"),
        (("top_p",), lambda value: 0 < value <= 1, "more than 0 and at most 1"),
        (("localized_delta", "max_threshold"), lambda value: 0 <= value <= 1, "from 0 to 1"),
        (("a_init",), lambda value: value == "kaiming" or value > 0, "kaiming or more than 0"),
        (("router_init",), lambda value: value == "kaiming" or value >= 0, "kaiming or at least 0"),
    )
    for names, holds, words in bounds:
        for name in names:
            value = getattr(full, name)
            if name in used and not all(map(holds, value if isinstance(value, tuple) else (value,))):
                yield name, f"{name} must be {words}, not {shown(value)}; change it"


def _choices(full: BankConfig) -> Iterator[Finding]:
    site, router = str(full.site), str(full.router)
    if router not in _ROUTERS[site]:
        why = {
            "experts": "routed experts are chosen by the model's own router",
            "ffn": "the experts of a feed-forward bank have to be chosen",
            "linear": "a linear layer does not see the model's router",
            "parallel": "a prompt chooses among the linear layers of one layer",
        }[site]
        yield "router", f"router={router} with site: {site}: {why}; write {_one_of('router', _ROUTERS[site])}"
    elif full.combine not in _COMBINES[router]:
        why = {
            "none": "nothing weighs the experts",
            "base": "the model's router chooses its top k",
            "token": "a router has to be asked",
            "task": "a task's weights are the same for all its tokens",
            "prompt": "a prompt's weights are the same for all tokens after it",
        }[router]
        allowed = _one_of("combine", _COMBINES[router])
        more = " or give the bank a router (router: token)" if router == "none" and "token" in _ROUTERS[site] else ""
        yield "combine", f"combine={full.combine} with router: {router}: {why}; write {allowed}{more}"
    if full.share not in _SHARES[site]:
        yield (
            "share",
            f"share={full.share} is not for site: {site}; write {_one_of('share', _SHARES[site])}",
        )
    if full.site == "experts":
        for target in full.targets:
            if not any(_names(target, tensor) for tensor in EXPERT_TENSORS):
                yield "targets", f"targets: experts have no tensor {target!r}; they have {', '.join(EXPERT_TENSORS)}"


def _kinds(full: BankConfig) -> Iterator[Finding]:
    if full.kind == "scale":
        if full.site != "linear":
            yield "kind", f"kind=scale scales what linear layers give, and site is {full.site}; write kind: lowrank"
        if full.share != "none":
            yield "share", f"share={full.share} shares low-rank factors, and kind: scale has none; write share: none"
        if full.mixer:
            yield "mixer", "mixer=true stands between low-rank factors, and kind: scale has none; write mixer: false"
    elif full.mixer and (full.site not in ("linear", "parallel") or full.router == "base"):
        yield "mixer", f"mixer=true is for banks of their own, not for site: {full.site} here; write mixer: false"
    if full.share != "A" or full.share not in _SHARES[str(full.site)]:
        return
    if full.router == "base":
        yield "share", "share=A is for experts of the bank's own, and router: base has the model's; write share: none"
    elif full.combine == "static":
        yield "share", "share=A shares between experts, and combine: static has one; write share: none or combine: sum"


def _trained(full: BankConfig) -> Iterator[Finding]:
    """Of banks whose experts are trained adapters."""
    if full.score != "linear" and not full.adapters:
        fresh = ", or write num_experts for experts that train too" if full.score == "states" else ""
        if not fresh or 1 in _as_tuple(full.num_experts):
            say = f"adapters is empty, and score: {full.score} is of trained adapters"
            yield "adapters", f"{say}; list two or more of their folders{fresh}"
        elif full.router != "token" or full.site == "linear":
            yield from _scored(full)
        else:
            yield "score", f"score={full.score} is for linear layers, not for site: {full.site}; write score: linear"
    if not full.adapters:
        return
    if twice := [folder for i, folder in enumerate(full.adapters) if folder in full.adapters[:i]]:
        yield "adapters", f"adapters names {twice[0]!r} twice; keep one"
    elif len(full.adapters) < 2:
        yield "adapters", f"adapters has {full.adapters[0]!r} alone, and there is nothing to choose; list two or more"
    if full.num_experts != len(full.adapters):
        say = f"num_experts={shown(full.num_experts)}, and adapters names {len(full.adapters)}, which are the experts"
        yield "num_experts", f"{say}; remove num_experts"
    if full.site != "linear":
        yield "adapters", f"adapters are for site: linear, not {full.site}; remove them, or write site: linear"
        return
    if full.router not in ("token", "task"):
        yield "router", f"router={full.router} weighs no adapters; write router: token or router: task"
    for field, needed in (("kind", "lowrank"), ("share", "none"), ("mixer", False), ("contrastive_coef", 0.0)):
        if (value := getattr(full, field)) != needed:
            say = f"{field}={shown(value)} is for factors that train, and those of adapters are what they are"
            yield field, f"{say}; write {field}: {shown(needed)}"
    if isinstance(full.r, tuple):
        yield "r", f"r={shown(full.r)}: adapters of all layers are kept at one rank; write the largest of theirs"
    if full.score != "linear":
        yield from _scored(full)


def _prompted(full: BankConfig) -> Iterator[Finding]:
    """Of banks whose experts are the modules of a layer, one low-rank product each."""
    if full.router != "prompt" or full.site != "linear":
        return
    for field, needed in (("kind", "lowrank"), ("share", "none"), ("mixer", False)):
        if (value := getattr(full, field)) != needed:
            say = f"{field}={shown(value)}, and with router: prompt each module is one expert, A and B"
            yield field, f"{say}; write {field}: {shown(needed)}"
    if full.balance not in ("none", "switch"):
        say = f"balance={full.balance} is for weights of tokens, and router: prompt weighs samples"
        yield "balance", f"{say}; write balance: switch or balance: none"
    if full.balance_pooled:
        say = "balance_pooled=true, and router: prompt evens out the modules of each layer"
        yield "balance_pooled", f"{say}; write balance_pooled: false"


def _scored(full: BankConfig) -> Iterator[Finding]:
    """Of scores that are not a trained row for each expert."""
    if full.router != "token":
        yield "router", f"router={full.router} asks no token, and score: {full.score} does; write router: token"
    if full.combine not in ("soft", "top_k"):
        yield "combine", f"combine={full.combine} is for score: linear; write combine: top_k or combine: soft"
    if full.jitter:
        yield "jitter", f"jitter={full.jitter} is for score: linear, not {full.score}; write jitter: 0"
    for field in ("router_aux_loss_coef", "z_loss_coef") if full.score == "arrow" else ():
        if getattr(full, field):
            say = f"{field}={shown(getattr(full, field))} is for training, and score: arrow trains nothing"
            yield field, f"{say}; write {field}: 0"


def _losses(full: BankConfig) -> Iterator[Finding]:
    if full.balance != "none" and full.router not in ("token", "prompt"):
        yield (
            "balance",
            f"balance={full.balance} evens out what a router of the bank's own does for each token, and router is "
            f"{full.router}; write balance: none",
        )
    elif full.balance in ("localized_cv2", "product") and full.combine != "soft":
        yield (
            "balance",
            f"balance={full.balance} is a loss on soft weights, and combine is {full.combine}; write combine: soft or "
            "balance: switch",
        )
    elif full.balance == "switch" and full.combine == "soft" and full.router_aux_loss_coef:
        yield "balance", "balance=switch counts choices, and combine: soft makes none; write balance: none"
    elif full.balance_pooled and full.router_aux_loss_coef and len(set(_as_tuple(full.num_experts))) > 1:
        yield (
            "balance_pooled",
            f"balance_pooled=true, but layers with num_experts={shown(full.num_experts)} have no balance in common; "
            "write balance_pooled: false",
        )


def _counts(full: BankConfig) -> Iterator[Finding]:
    used = used_fields(full)
    counts = _as_tuple(full.num_experts)
    if "top_k" in used and _own(full) and (full.top_k or 1) > min(counts):
        yield "top_k", f"top_k={full.top_k} is more than num_experts={shown(full.num_experts)}; choose fewer"
    yield from _settled(full)
    if full.router == "task" and (full.num_tasks or 1) < 2:
        yield "num_tasks", f"num_tasks={full.num_tasks}: routing by task needs two or more; write how many the data has"
    if full.rank_rule == "per_total" and "num_experts" in used and full.kind == "lowrank":
        ranks = _as_tuple(full.r)
        if any(r % count for r in ranks for count in counts) and (len(ranks) == 1 or len(counts) == 1):
            yield (
                "r",
                f"r={shown(full.r)} cannot be divided among num_experts={shown(full.num_experts)} (rank_rule: "
                "per_total); choose a multiple",
            )


def _settled(full: BankConfig) -> Iterator[Finding]:
    """Routers whose weights are 1 whatever they learn: a softmax over a single logit."""
    if not _weighs(full) or full.score == "arrow":  # which trains nothing
        return
    if _own(full) and 1 in _as_tuple(full.num_experts):
        less = ", or for one expert that all tokens use router: none and combine: static"
        yield (
            "num_experts",
            f"num_experts={shown(full.num_experts)} leaves router: {full.router} nothing to choose where it is 1, so "
            f"that router never trains; write 2 or more{less if 'none' in _ROUTERS[str(full.site)] else ''}",
        )
    elif full.combine == "top_k" and full.top_k == 1 and full.renormalise:
        switch = " or combine: switch" if full.router == "token" and full.score == "linear" else ""
        yield (
            "renormalise",
            "renormalise=true makes the only weight of top_k=1 always 1, so the router learns nothing from the model's "
            f"loss; write renormalise: false{switch}",
        )


def _as_tuple(value: Count | None) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value or 1,)


def _names(target: str, tensor: str) -> bool:
    """Whether a pattern could name an expert's tensor in some layer: its last part does."""
    return fnmatchcase(tensor, target.rpartition(".")[2])


def _one_of(field: str, choices: Iterable[str]) -> str:
    return " or ".join(f"{field}: {choice}" for choice in choices)
