"""Proof that adapters train: whatever processed tokens that carry loss must get a gradient in B.

B starts at zero, so in the first steps A and the bank routers legitimately get no gradient, and an
adapter that was cut off from the output leaves no trace in the loss. Only B tells.

Shapes: T tokens, K choices, E experts (global), L local experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lora.errors import AdapterError
from lora.experts import ExpertLoRA
from lora.linear import RoutedLinear
from moe.refs import ExpertRef


@dataclass
class _Site:
    """One B: what should have moved it, and what did. Entries are global experts, or a single one for a linear."""

    names: list[str]
    parameter: nn.Parameter
    first: int
    seen: Tensor
    moved: Tensor
    passed: Tensor

    def record(self, grad: Tensor) -> None:
        if len(self.names) == 1:
            self.moved |= (grad != 0).any()
        else:
            mine = slice(self.first, self.first + grad.shape[0])
            self.moved[mine] |= (grad != 0).flatten(1).any(1)


@dataclass
class _Place:
    """One module that calls adapters: its sites, and the hooks to take off when all of them have passed."""

    sites: list[_Site]
    hooks: list[RemovableHandle]

    @property
    def passed(self) -> bool:
        return all(bool(site.passed.all()) for site in self.sites)


class AdapterWatch:
    """Raises when an adapter silently does not train, by name, and costs nothing once all have passed.

    Tokens are counted where the model calls the experts or the linear, not inside the adapter, so an
    adapter that is never called is caught too; and only tokens whose output receives a gradient count,
    so that padding and unlabelled positions raise no false alarm. B's gradients are observed by tensor
    hooks: ZeRO-1/2 take ``.grad`` away during backward.

    Create it after ``attach`` (and after any wrapping of the experts' class), before the first backward;
    call :meth:`check` after the backwards of each step until ``done``.
    """

    def __init__(self, model: nn.Module) -> None:
        self._places: list[_Place] = []
        for path, module in model.named_modules():
            if isinstance(module, RoutedLinear):
                self._places.append(_watch_linear(f"{path}.adapter.B", module))
            elif isinstance(getattr(module, "adapter", None), ExpertLoRA):
                self._places.append(_watch_experts(module))

    @property
    def done(self) -> bool:
        """Every adapter of the whole job has been seen to get a gradient; all hooks are gone."""
        return not self._places

    def check(
        self,
        grads: Callable[[nn.Parameter], Tensor | None] | None = None,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> list[str]:
        """Names of the adapters that no token with loss has reached so far. Collective: call on every rank.

        Args:
            grads: where to read B's gradient instead of what the hooks observed, e.g. after the
                optimizer's own reduction; None means this parameter has no gradient.
            reduce: returns the sum of a tensor over all ranks of the job; None on a single rank.

        Raises AdapterError, on every rank, naming each adapter that processed tokens with loss on any
        rank while its B got no gradient, or one that is all zero, on every rank that holds it.
        """
        if self.done:
            return []
        sites = [site for place in self._places for site in place.sites]
        if grads is not None:
            _reread(sites, grads)
        flags = torch.stack([torch.cat([s.seen for s in sites]), torch.cat([s.moved for s in sites])]).float()
        seen, moved = ((reduce(flags) if reduce else flags) > 0).cpu()
        dead, pending, start = [], [], 0
        for site in sites:
            mine = slice(start, start + len(site.names))
            start = mine.stop
            saw, trained, left = seen[mine], moved[mine], ~site.passed
            dead += [site.names[i] for i in (left & saw & ~trained).nonzero()]
            pending += [site.names[i] for i in (left & ~saw).nonzero()]
            site.passed |= saw & trained
        if dead:
            raise AdapterError(_complaint(dead))
        self._release()
        return pending

    def close(self) -> None:
        """Stop watching whatever is left."""
        for place in self._places:
            for site in place.sites:
                site.passed.fill_(True)
        self._release()

    def _release(self) -> None:
        for place in self._places:
            if place.passed:
                for hook in place.hooks:
                    hook.remove()
        self._places = [place for place in self._places if not place.passed]


def _reread(sites: list[_Site], grads: Callable[[nn.Parameter], Tensor | None]) -> None:
    for site in sites:
        site.moved.zero_()
        grad = grads(site.parameter)
        if grad is not None:
            site.record(grad.view_as(site.parameter))


def _site(names: list[str], parameter: nn.Parameter, first: int = 0) -> _Site:
    seen = torch.zeros(len(names), dtype=torch.bool, device=parameter.device)
    passed = torch.zeros(len(names), dtype=torch.bool)
    return _Site(names, parameter, first, seen, seen.clone(), passed)


def _gradient_hooks(sites: list[_Site]) -> list[RemovableHandle]:
    # A B that requires no gradient gets no hook, records nothing, and so fails the check by name.
    return [s.parameter.register_hook(s.record) for s in sites if s.parameter.requires_grad]


def _watch_linear(name: str, module: RoutedLinear) -> _Place:
    site = _site([name], module.adapter.B)

    def count(dy: Tensor) -> None:
        site.seen |= (dy != 0).any()

    hook = module.register_forward_hook(lambda _module, _args, y: _observed(y, count))
    return _Place([site], [hook, *_gradient_hooks([site])])


def _watch_experts(module: nn.Module) -> _Place:
    experts = range(module.num_experts)
    sites = [
        _site(
            [f"{ExpertRef(module.layer, e)}.adapter.{tensor}.B" for e in experts],
            factors.B,
            module.first_expert,
        )
        for tensor, factors in module.adapter.named_children()
    ]

    def hook(_module: nn.Module, args: tuple, kwargs: dict, y_TH: Tensor) -> Tensor:
        given = dict(zip(("hidden_states", "top_k_index", "top_k_weights"), args, strict=False)) | kwargs
        index_TK = given["top_k_index"]
        # Some models mark masked choices by an index out of range.
        used_TK = (given["top_k_weights"].detach() != 0) & (index_TK >= 0) & (index_TK < len(experts))

        def count(dy_TH: Tensor) -> None:
            live_T1 = (dy_TH != 0).flatten(0, -2).any(-1, keepdim=True)
            for site in sites:
                site.seen[index_TK[used_TK & live_T1]] = True

        return _observed(y_TH, count)

    return _Place(sites, [module.register_forward_hook(hook, with_kwargs=True), *_gradient_hooks(sites)])


def _observed(y: Tensor, count: Callable[[Tensor], None]) -> Tensor:
    if not torch.is_grad_enabled():
        return y
    if not y.requires_grad:
        # Nothing below is connected: the very defect we look for. A leaf here lets the gradient show.
        y = y.detach().requires_grad_()
    y.register_hook(count)
    return y


def _complaint(dead: list[str]) -> str:
    shown = ", ".join(dead[:8]) + (f" and {len(dead) - 8} more" if len(dead) > 8 else "")
    return (
        f"no gradient reached {shown}, although tokens that carry loss passed through there: "
        "the adapter is cut off from the model's output or does not require gradients; look for what detaches "
        "or replaces it after attach"
    )
