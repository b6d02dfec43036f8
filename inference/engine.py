"""A model folder, opened: prompts in, texts out. The engine underneath is what a server drives."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import count
from operator import index
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inference.batching import MAX_ROWS, MAX_SEQUENCES, Engine, Joint
from inference.calibrate import ExpertKind, machine_profile
from inference.costmodel import MachineProfile
from inference.errors import InferenceError
from inference.kv import PagedKV
from inference.model import Forward, Model
from inference.offload import Crossing, packing_said
from inference.opening import (
    Base,
    MakePolicy,
    adapt,
    attach_all,
    capture_steps,
    end_tokens,
    join,
    open_base,
    open_kv,
    open_tokenizer,
    place_in,
    watch,
)
from inference.placement import model_sizes
from inference.prompts import check_text
from inference.report import Measured, Report
from inference.requests import Output, Request, SamplingParams
from inference.stats import Generation, Stats

__all__ = ["LLM", "Engine", "Generation", "Stats"]

Prompt = str | Sequence[int]


class LLM:
    """A language model whose routed experts stay in their files, ``expert_budget`` of them resident.

    A dense Llama, Mistral or Qwen model, the base of an adapter, is wholly resident.

    Args:
        path: a folder as ``planaria export`` or ``save_pretrained`` writes it: config.json, safetensors, tokenizer.
        expert_budget: share of all routed experts that may be resident, 0 to 1; anything above 0 is at least one. A
            dense model has none to leave in the files, so it takes 1 only.
        adapter: folder of an adapter in the native format, which every request gets.
        device: where to compute; CUDA if there is one.
        dtype: precision to compute in; the folder's own by default.
        poison: fill given-up slots with NaN.
        policy: which resident experts give up their places, made from (layers, experts, slots); by default
            :class:`~inference.shadow.Hedge`, or LRU where none ever has to.
        adapters: folders of several adapters by the name that requests ask for them; those that name none get the base
            model. All share its weights, its resident experts and its key-value cache.
        kv_tokens: tokens whose keys and values are kept, of all requests together; by default 32768, or what a quarter
            of the device's free memory holds if that is less.
        crossing: how experts reach a GPU: what predicts and prefetches them, whether all are page-locked, and packed
            there, and whether the CPU computes some; ``packing`` says whether they are packed, and if not why.
        vram: in place of ``expert_budget``, memory for all of the model: bytes, or text as ``8GiB``. Experts are given
            what the dense part, the keys and values and, on a GPU, half a gibibyte for CUDA, two layers' experts for
            prompts to stream through and the ring for packed experts leave.
        graphs: capture decode steps of few sequences as CUDA graphs, see :mod:`inference.graphed`; by default where
            they can be, and ``decoding`` says whether. With fetching alone the tokens are the same either way; where
            the CPU computes experts, too, logits are close.
        trace: file to make, in which the routing of everything that is served is recorded, with what lookahead heads
            say if the folder has any; :meth:`close` ends it.
        max_rows, max_sequences, reuse: see :class:`~inference.batching.Engine`.

    Raises:
        InferenceError: the folder is damaged or of no known kind, or a setting is out of range.
        lora.errors.AdapterError: the adapter is damaged or does not fit the model.
    """

    def __init__(
        self,
        path: str | Path,
        expert_budget: float = 1.0,
        adapter: str | Path | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        poison: bool = False,
        policy: MakePolicy | None = None,
        *,
        adapters: Mapping[str, str | Path] | None = None,
        kv_tokens: int | None = None,
        crossing: Crossing | None = None,
        vram: int | str | None = None,
        graphs: bool | None = None,
        trace: str | Path | None = None,
        max_rows: int = MAX_ROWS,
        max_sequences: int = MAX_SEQUENCES,
        reuse: bool = True,
    ) -> None:
        if adapter is not None and adapters:
            raise InferenceError("adapter and adapters are both given; name all of them in adapters")
        self.path = Path(path)
        self.device = _device(device)
        if vram is not None:
            if expert_budget != 1:
                raise InferenceError("vram and expert_budget both say how many experts are resident; give one of them")
            pack = (crossing or Crossing()).packs
            placed = place_in(self.path, vram, kv_tokens, self.device, dtype, pack)
            expert_budget, kv_tokens = placed.share, placed.kv_tokens
        base = open_base(self.path, expert_budget, self.device, dtype, poison, policy, crossing, trace is not None)
        self._base = base
        self.model, self.cache, self.dtype, self.executor = base.module, base.cache, base.dtype, base.executor
        if adapter is not None:
            attach_all(base, {"adapter": base.module}, {"adapter": adapter})
        kv = open_kv(base, kv_tokens)
        model = Model(base.module, kv)
        watched = adapter is not None or trace is not None
        forward, self.decoding = capture_steps(model, base, graphs, watched=watched)
        models: dict[str | None, Forward] = {None: forward}
        adapted, joint, trees = _adapted(base, adapters or {}, kv)
        self.tokenizer = open_tokenizer(self.path)
        begins = [base.begin]  # called when a sequence starts
        self.engine = Engine(
            models | adapted,
            joint=joint,
            decode=None if self.tokenizer is None else partial(_decode, self.tokenizer),
            special=_special(self.tokenizer),
            eos=end_tokens(self.path, base.module.config),
            max_rows=max_rows,
            max_sequences=max_sequences,
            reuse=reuse,
            joined=lambda: [begin() for begin in begins],
        )
        self._recorder = watch(base, [base.module, *trees], trace)
        if self._recorder is not None:
            begins.append(self._recorder.begin)
        self._numbers = count()

    @property
    def recording_failed(self) -> bool:
        """The trace could not be written on; what is served is not touched by that."""
        return self._recorder is not None and self._recorder.failure is not None

    @property
    def packing(self) -> str:
        """Whether experts are packed in host memory, and if not why, in a sentence; empty where none are kept there."""
        return "" if self.executor is None else packing_said(self.executor.transfers.source, self.device)

    def close(self) -> None:
        """Ends the recording of routing, and gives back host memory, threads and files; figures stay.

        To be called when nobody drives the engine; it serves nothing from then on.
        """
        self.engine.close()
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None
        self._base.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        seed: int | None = 0,
        adapter: str | None = None,
        **settings: Any,
    ) -> list[Generation]:
        """Continues all prompts (text or token ids) together, greedily at temperature 0.

        Prompt number i draws from its own stream, seeded by ``seed + i``; without a seed nobody can foresee it.
        ``settings`` are the others of :class:`~inference.requests.SamplingParams`. Not to be called while somebody else
        drives ``engine``.

        Raises InferenceError for settings out of range, and for prompts that are empty, too long for the model or the
        cache or outside its vocabulary, before anything is generated; and while it is, if a file cannot be read any
        more or the logits are not finite.
        """
        if isinstance(prompts, str):
            raise InferenceError("prompts is one string; give a list of prompts")
        if unknown := sorted(settings.keys() - {field.name for field in fields(SamplingParams)}):
            known = ", ".join(field.name for field in fields(SamplingParams))
            raise InferenceError(f"no sampling setting is called {unknown[0]}; there are {known}")
        shared = SamplingParams(temperature=temperature, seed=seed, **settings)
        requests = []
        for i, prompt in enumerate(prompts):
            params = shared if seed is None else replace(shared, seed=seed + i)
            name = f"generate-{next(self._numbers)}"
            requests.append(Request(name, self._encode(prompt), params, max_new_tokens, adapter))
        for request in requests:
            self.engine.limits.check(request)
        outputs = self._run(requests)
        return [_generation(request, outputs[request.id]) for request in requests]

    def _run(self, requests: Sequence[Request]) -> dict[str, list[Output]]:
        outputs: dict[str, list[Output]] = {request.id: [] for request in requests}
        waited_for = set(outputs)
        try:
            for request in requests:
                self.engine.submit(request)
            while waited_for:
                for output in self.engine.step():
                    if output.id in waited_for:
                        outputs[output.id].append(output)
                        if output.finish == "error":
                            failure = self.engine.failure
                            if isinstance(failure, InferenceError):
                                raise InferenceError(f"generation failed: {failure}") from failure
                            raise RuntimeError(f"generation failed: {output.error}") from failure
                        if output.finish is not None:
                            waited_for.remove(output.id)
        finally:
            for name in waited_for:
                self.engine.cancel(name)
        return outputs

    def stats(self) -> Stats:
        cache, counts = self.cache, self.engine.counts
        if cache is None:
            return Stats(0, 0, 0, 0, 0, 0, counts.new_tokens, counts.seconds)
        measured = self._measured()
        return Stats(
            hits=measured.hits,
            misses=measured.misses,
            bytes_fetched=measured.fetched_bytes,
            slots=cache.slots,
            resident=len(cache.resident),
            total_experts=cache.store.total,
            new_tokens=counts.new_tokens,
            seconds=counts.seconds,
            cpu_experts=measured.cpu_experts,
            prefetched=measured.prefetched,
        )

    def report(self, profile: MachineProfile | None = None) -> Report:
        """Hits, bytes and waits since the model was opened, how near they come to the floor, and what to change.

        ``profile`` is this machine's by default, which is measured in two seconds unless it is known already. Raises
        InferenceError for a dense model, of which :meth:`stats` says all there is.
        """
        if self.cache is None:
            raise InferenceError(f"{self.path} is a dense model, all of it resident: see stats()")
        packed = self.executor is not None and self.executor.transfers.source.packs
        sizes = model_sizes(self.path, str(self.dtype).removeprefix("torch.")).kept(pack=packed)
        if profile is None:
            profile = machine_profile(ExpertKind(sizes.hidden, sizes.intermediate, self.dtype, packed), self.device)
        return Report.of(self._measured(), sizes, profile)

    def _measured(self) -> Measured:
        assert self.cache is not None
        counts, experts = self.engine.counts, self.cache.counts
        return Measured(
            seconds=counts.seconds,
            new_tokens=counts.new_tokens,
            rows=counts.rows,
            passes=counts.passes,
            slots=self.cache.slots,
            hits=experts.hits,
            misses=experts.misses,
            **({"fetched_bytes": experts.bytes_fetched} | self._crossed()),
        )

    def _crossed(self) -> dict[str, Any]:
        """What the link and the CPU beside it did."""
        executor = self.executor
        if executor is None or self.cache is None:
            return {}
        moved, experts = executor.transfers.counts, self.cache.counts
        plan, passes = executor.plan, executor.passes
        return {
            "fetched_bytes": moved.demanded_bytes + moved.prefetched_bytes,
            "cpu_experts": experts.computed,
            "prefetched": experts.useful + experts.wasted,
            "wasted": experts.wasted,
            "stall_s": executor.transfers.link.stall_s,
            "ways": {} if plan is None else dict(plan.modes),
            "newest_plan": "" if plan is None or plan.newest is None else plan.newest.reason(),
            "pass_ways": {} if passes is None else dict(passes.modes),
            "newest_pass": "" if passes is None or passes.newest is None else passes.newest.reason(),
        }

    def logits(self, token_ids: Sequence[int], adapter: str | None = None) -> Tensor:
        """Scores [S, V] of every position of one sequence."""
        return self.engine.logits(_token_ids(token_ids), adapter)

    def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            return _token_ids(prompt)
        if self.tokenizer is None:
            raise InferenceError(f"{self.path} has no tokenizer; add tokenizer.json, or give token ids to LLM.generate")
        check_text(prompt)
        return tuple(self.tokenizer(prompt)["input_ids"])


def _device(asked: torch.device | str | None) -> torch.device:
    try:
        device = torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, TypeError) as error:
        raise InferenceError(f"device={asked!r} is no device; give cpu or cuda") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InferenceError(
            f"device={str(asked)!r}: PyTorch finds {torch.cuda.device_count()} CUDA GPUs here; give cpu"
        )
    return device


def _token_ids(tokens: Sequence[int]) -> tuple[int, ...]:
    try:
        return tuple(index(token) for token in tokens)
    except TypeError as error:  # what is no whole number, which int() would cut
        raise InferenceError(
            f"{reprlib.repr(tokens)} is neither text nor token ids, which are whole numbers"
        ) from error


def _adapted(
    base: Base, folders: Mapping[str, str | Path], kv: PagedKV
) -> tuple[dict[str | None, Forward], Joint | None, list[nn.Module]]:
    """What computes the rows of each adapter, what those of several at once, and the modules of all."""
    trees = adapt(base, folders)
    models: dict[str | None, Forward] = {name: Model(module, kv) for name, module in trees.items()}
    joined = join(base, trees)
    if joined is None:
        return models, None, [*trees.values()]
    module, names = joined
    return models, Joint(Model(module, kv), names), [*trees.values(), module]


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _special(tokenizer: Any) -> dict[str, int]:
    if tokenizer is None:
        return {}
    added = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def _generation(request: Request, outputs: Sequence[Output]) -> Generation:
    tokens = tuple(token for output in outputs for token in output.new_ids)
    logprobs = tuple(each for output in outputs for each in output.logprobs)
    return Generation("".join(o.text for o in outputs), tokens, request.prompt_ids, outputs[-1].finish or "", logprobs)
