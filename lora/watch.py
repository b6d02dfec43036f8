"""Proof that adapters train: whatever processed tokens that carry loss must get a gradient in B.

B starts at zero, so in the first steps A and the bank routers legitimately get no gradient, and an
adapter that was cut off from the output leaves no trace in the loss. Only B tells. What an adapter
offers for this is in :mod:`lora.sites`.

Shapes: T tokens, K choices, E experts (global), L local experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lora.errors import AdapterError
from lora.sites import Probed
from moe.refs import ExpertRef

LAST_STEP = 1024  # of the watch: what no token has reached by then is named and left


@dataclass
class _Site:
    """One probe: what should have moved it, and what did. Entries are global experts, or a single one for all."""

    names: list[str]
    parameter: nn.Parameter
    first: int
    seen: Tensor
    moved: Tensor
    passed: Tensor

    def expect(self, live_T: Tensor, used_TE: Tensor | None) -> None:
        """Note who has to get a gradient: ``live_T`` had one themselves, ``used_TE`` says where they went."""
        if used_TE is None or (len(self.names) == 1 and used_TE.shape[1] != 1):
            self.seen |= live_T.any()
        elif used_TE.shape == (len(live_T), len(self.names)):
            self.seen |= (used_TE & live_T.unsqueeze(1)).any(0)
        else:
            raise AdapterError(
                f"{self.names[0]}: gates of shape {tuple(used_TE.shape)} were observed for {len(live_T)} tokens and "
                f"{len(self.names)} experts; see lora.sites"
            )

    def record(self, grad: Tensor) -> None:
        if len(self.names) == 1:
            self.moved |= (grad != 0).any()
        else:
            mine = slice(self.first, self.first + grad.shape[0])
            self.moved[mine] |= (grad != 0).flatten(1).any(1)


@dataclass
class _Place:
    """One adapted module: its probes, and the hooks to take off when all of them have passed."""

    sites: list[_Site]
    hooks: list[RemovableHandle]
    adapter: nn.Module
    gates: list[Tensor] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(bool(site.passed.all()) for site in self.sites)

    def release(self) -> None:
        for hook in self.hooks:
            hook.remove()
        if hasattr(self.adapter, "observe"):
            self.adapter.observe = None


class AdapterWatch:
    """Raises when an adapter silently does not train, by name, and costs nothing once all have passed.

    Tokens are counted where the model calls the adapted module, not inside the adapter, so an
    adapter that is never called is caught too; and only tokens whose output receives a gradient count,
    so that padding and unlabelled positions raise no false alarm. B's gradients are observed by tensor
    hooks: ZeRO-1/2 take ``.grad`` away during backward.

    Create it after ``attach`` (and after any wrapping of the experts' class), before the first backward;
    call :meth:`after_step` after the backwards of each step until ``done``, or :meth:`check` whenever you like.
    """

    def __init__(self, model: nn.Module) -> None:
        self._steps = 0
        self._places: list[_Place] = []
        for path, module in model.named_modules():
            adapter = getattr(module, "adapter", None)
            if isinstance(adapter, nn.Module):
                if not isinstance(adapter, Probed):
                    raise AdapterError(f"{path}.adapter ({type(adapter).__name__}) has no probes; see lora.sites")
                self._places.append(_watch(path, module, adapter))

    @property
    def done(self) -> bool:
        """Every adapter of the whole job has been seen to get a gradient; all hooks are gone."""
        return not self._places

    def after_step(self, reduce: Callable[[Tensor], Tensor] | None = None, last: bool = False) -> str:
        """:meth:`check` after steps 1, 2, 4, 8, ... of the watch; returns a line to print, or nothing.

        A check reads back from the device, and of many experts some may never be routed. So checks become rare, and
        the watch ends after step 1024, or earlier with the run's ``last`` step. What tokens reach between two checks is
        remembered. Collective in the same steps on every rank.
        """
        self._steps += 1
        ends = last or self._steps >= LAST_STEP
        if self.done or (self._steps & (self._steps - 1) and not ends):
            return ""
        waiting = self.check(reduce=reduce)
        if not waiting:
            return ""
        if ends:
            self.close()
            return f"never routed in {self._steps} steps, so not known to train: {_listed(waiting)}"
        return f"not yet routed, checked when they are: {_listed(waiting)}" if self._steps == 1 else ""

    def check(self, reduce: Callable[[Tensor], Tensor] | None = None) -> list[str]:
        """Names of the adapters that no token with loss has reached so far. Collective: call on every rank.

        Args:
            reduce: returns the sum of a tensor over all ranks of the job; None on a single rank.

        Raises AdapterError, on every rank, naming each adapter that processed tokens with loss on any
        rank while its B got no gradient, or one that is all zero, on every rank that holds it.
        """
        if self.done:
            return []
        sites = [site for place in self._places for site in place.sites]
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
                place.release()
        self._places = [place for place in self._places if not place.passed]


def _site(names: list[str], parameter: nn.Parameter, first: int = 0) -> _Site:
    seen = torch.zeros(len(names), dtype=torch.bool, device=parameter.device)
    passed = torch.zeros(len(names), dtype=torch.bool)
    return _Site(names, parameter, first, seen, seen.clone(), passed)


def _gradient_hooks(sites: list[_Site]) -> list[RemovableHandle]:
    # A B that requires no gradient gets no hook, records nothing, and so fails the check by name.
    return [s.parameter.register_hook(s.record) for s in sites if s.parameter.requires_grad]


def _watch(path: str, host: nn.Module, adapter: nn.Module) -> _Place:
    routed = hasattr(host, "first_expert")  # called with the model's own choices of experts
    sites = [_probe(f"{path}.adapter.{name}", p, hasattr(adapter, "observe")) for name, p in adapter.probes()]
    place = _Place(sites, _gradient_hooks(sites), adapter)
    if hasattr(adapter, "observe"):
        adapter.observe = lambda gate_TE: place.gates.append(gate_TE.detach())

    def hook(_module: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple) -> Tensor | tuple:
        y = output[0] if isinstance(output, tuple) else output
        used_TE = _chosen(host.num_experts, args, kwargs) if routed else None
        if place.gates:
            used_TE = torch.cat(place.gates) != 0
            place.gates.clear()

        def count(dy: Tensor) -> None:
            live_T = (dy != 0).flatten(0, -2).any(-1)
            for site in sites:
                site.expect(live_T, used_TE)

        y = _observed(y, count)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    place.hooks.append(host.register_forward_hook(hook, with_kwargs=True))
    return place


def _probe(name: str, parameter: nn.Parameter, observed: bool) -> _Site:
    address = parameter.address
    if address.is_expert:
        names = [f"{ExpertRef(address.layer, e)}.{address.tensor}" for e in range(address.num_experts)]
        return _site(names, parameter, address.first_expert)
    if observed and parameter.dim() > 1 and parameter.shape[0] > 1:
        return _site([f"{name}[{e}]" for e in range(parameter.shape[0])], parameter)
    return _site([name], parameter)


def _chosen(experts: int, args: tuple, kwargs: dict) -> Tensor:
    """[T, E]: whether a token's output has a part of an expert, from the arguments that the experts are called with."""
    given = dict(zip(("hidden_states", "top_k_index", "top_k_weights"), args, strict=False)) | kwargs
    index_TK, weights_TK = given["top_k_index"], given["top_k_weights"].detach()
    # Some models mark masked choices by an index out of range, which equals no expert's.
    hit_TKE = index_TK.unsqueeze(-1) == torch.arange(experts, device=index_TK.device)
    return (hit_TKE & (weights_TK != 0).unsqueeze(-1)).any(1)


def _observed(y: Tensor, count: Callable[[Tensor], None]) -> Tensor:
    if not torch.is_grad_enabled():
        return y
    if not y.requires_grad:
        # Nothing below is connected: the very defect we look for. A leaf here lets the gradient show.
        y = y.detach().requires_grad_()
    y.register_hook(count)
    return y


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _complaint(dead: list[str]) -> str:
    return (
        f"no gradient reached {_listed(dead)}, although tokens that carry loss passed through there: "
        "the adapter is cut off from the model's output or does not require gradients; look for what detaches "
        "or replaces it after attach"
    )
