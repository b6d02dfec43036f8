"""Generation with a budget of resident experts.

transformers' own model and key-value cache, with each block's experts borrowed from a cache over the mapped files,
and our own decode loop, one sequence at a time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, DynamicCache

from inference.cache import CacheCounts, ExpertCache
from inference.policies import LRU, Policy
from inference.sampling import next_token
from inference.shadow import Hedge
from inference.skeleton import build_skeleton, expert_shape, load_dense, offload_experts
from inference.store import ExpertStore, InferenceError, TensorFiles
from lora.format import apply_adapter, load_adapter
from moe.families import MoEBlock
from moe.fingerprint import fingerprint

Prompt = str | Sequence[int]
MakePolicy = Callable[[int, int, int], Policy]  # (layers, experts, slots)


@dataclass(frozen=True)
class Generation:
    """What one prompt led to.

    Attributes:
        text: the new tokens decoded; empty without a tokenizer.
        token_ids: the new tokens, an end-of-sequence token included.
        prompt_ids: the prompt as the model saw it.
        finish: ``eos`` or ``length``.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_ids: tuple[int, ...]
    finish: str


@dataclass(frozen=True)
class Stats:
    """Totals since the model was opened. Seconds are wall time inside ``generate``, prompts included."""

    hits: int
    misses: int
    bytes_fetched: int
    slots: int
    resident: int
    total_experts: int
    new_tokens: int
    seconds: float

    @property
    def hit_rate(self) -> float:
        return self.hits / max(self.hits + self.misses, 1)

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        speed = f"{self.new_tokens} tokens in {self.seconds:.2f} s, {self.tokens_per_second:.1f} tokens/s"
        if not self.total_experts:
            return f"a dense model, all of it resident; {speed}"
        return (
            f"experts: {self.hits} hits, {self.misses} misses ({self.hit_rate:.1%} hits), "
            f"{self.bytes_fetched / 1e6:.1f} MB fetched, {self.resident}/{self.total_experts} resident; {speed}"
        )


class LLM:
    """A MoE language model whose routed experts stay in their files, ``expert_budget`` of them resident.

    A dense Llama, Mistral or Qwen model, the base of an adapter, is wholly resident.

    Args:
        path: a folder as ``planaria export`` or ``save_pretrained`` writes it: config.json, safetensors, tokenizer.
        expert_budget: share of all routed experts that may be resident, 0 to 1; anything above 0 is at least one. A
            dense model has none to leave in the files, so it takes 1 only.
        adapter: folder of an adapter in the native format.
        device: where to compute; CUDA if there is one.
        dtype: precision to compute in; the folder's own by default.
        poison: fill given-up slots with NaN.
        policy: which resident experts give up their places, made from (layers, experts, slots); by default
            :class:`~inference.shadow.Hedge`, or LRU where none ever has to.

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
    ) -> None:
        if not 0 <= expert_budget <= 1:
            raise InferenceError(f"expert budget {expert_budget} is out of range; give a share from 0 to 1, as 0.25")
        self.path = Path(path)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        files = TensorFiles(self.path)
        self.model, blocks = build_skeleton(self.path, dtype)
        self.cache: ExpertCache | None = None
        if blocks:
            self.cache = self._offloaded(files, blocks, expert_budget, poison, policy)
        elif expert_budget != 1:
            raise InferenceError(
                f"{self.path} is a dense model: it has no experts to leave in the files, so an expert budget of "
                f"{expert_budget} means nothing; leave it out (1: all of the model is resident)"
            )
        load_dense(self.model, files, self.device)
        if adapter is not None:
            # Reads the whole folder once: an adapter on another base gives fluent nonsense, never an error.
            apply_adapter(self.model, load_adapter(adapter), base_fingerprint=fingerprint(self.path))
            self.model.to(self.device)
        self.tokenizer = _tokenizer(self.path)
        self.eos = _end_tokens(self.path, self.model.config)
        self._new_tokens = 0
        self._seconds = 0.0

    def _offloaded(
        self, files: TensorFiles, blocks: list[MoEBlock], expert_budget: float, poison: bool, policy: MakePolicy | None
    ) -> ExpertCache:
        """Have the blocks' experts borrow from a cache, which is returned."""
        shape = expert_shape(self.path, blocks)
        store = ExpertStore(files, {b.layer: f"{b.path}.experts" for b in blocks}, shape)
        slots = max(round(expert_budget * store.total), 1) if expert_budget else 0
        dtype = blocks[0].experts.gate_up_proj.dtype
        make = policy or (Hedge if 0 < slots < store.total else _never_asked)
        chosen = make(len(store.layers), shape.num_experts, slots)
        cache = ExpertCache(store, slots, device=self.device, dtype=dtype, policy=chosen, poison=poison)
        offload_experts(blocks, cache)
        return cache

    def generate(
        self, prompts: Sequence[Prompt], max_new_tokens: int = 64, *, temperature: float = 0.0, seed: int = 0
    ) -> list[Generation]:
        """Continues each prompt (text or token ids), greedily at temperature 0.

        Prompt number i draws from its own stream, seeded by ``seed + i``. Raises InferenceError for prompts that are
        empty, too long for the model or outside its vocabulary, before anything is generated.
        """
        if isinstance(prompts, str):
            raise InferenceError("prompts is one string; give a list of prompts")
        if max_new_tokens < 1 or temperature < 0:
            raise InferenceError(
                f"max_new_tokens={max_new_tokens} must be at least 1, temperature={temperature} at least 0"
            )
        encoded = [self._encode(prompt, max_new_tokens) for prompt in prompts]
        return [self._continue(ids, max_new_tokens, temperature, seed + i) for i, ids in enumerate(encoded)]

    def stats(self) -> Stats:
        cache = self.cache
        counts = CacheCounts() if cache is None else cache.counts
        return Stats(
            hits=counts.hits,
            misses=counts.misses,
            bytes_fetched=counts.bytes_fetched,
            slots=0 if cache is None else cache.slots,
            resident=0 if cache is None else len(cache.resident),
            total_experts=0 if cache is None else cache.store.total,
            new_tokens=self._new_tokens,
            seconds=self._seconds,
        )

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Scores [S, V] of every position of one sequence."""
        input_ids = torch.tensor([list(token_ids)], device=self.device)
        return self.model(input_ids=input_ids, use_cache=False).logits[0]

    @torch.inference_mode()
    def _continue(self, prompt_ids: tuple[int, ...], max_new_tokens: int, temperature: float, seed: int) -> Generation:
        started = time.perf_counter()
        if self.cache is not None:
            self.cache.policy.begin()
        generator = torch.Generator().manual_seed(seed) if temperature else None
        kv = DynamicCache(config=self.model.config)
        feed, new, finish = list(prompt_ids), [], "length"
        while len(new) < max_new_tokens:
            input_ids = torch.tensor([feed], device=self.device)
            out = self.model(input_ids=input_ids, past_key_values=kv, use_cache=True, logits_to_keep=1)
            token = next_token(out.logits[0, -1], temperature, generator)
            new.append(token)
            if token in self.eos:
                finish = "eos"
                break
            feed = [token]
        text = self.tokenizer.decode(new, skip_special_tokens=True) if self.tokenizer else ""
        self._new_tokens += len(new)
        self._seconds += time.perf_counter() - started
        return Generation(text, tuple(new), prompt_ids, finish)

    def _encode(self, prompt: Prompt, max_new_tokens: int) -> tuple[int, ...]:
        config = self.model.config
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InferenceError(f"{self.path} has no tokenizer; give token ids, or add tokenizer.json")
            ids = tuple(self.tokenizer(prompt)["input_ids"])
        else:
            ids = tuple(int(token) for token in prompt)
        if not ids:
            raise InferenceError("an empty prompt; give at least one token")
        wrong = [token for token in ids if not 0 <= token < config.vocab_size]
        if wrong:
            raise InferenceError(f"token {wrong[0]} is outside the model's vocabulary of {config.vocab_size}")
        longest = getattr(config, "max_position_embeddings", None)
        if longest is not None and len(ids) + max_new_tokens > longest:
            raise InferenceError(
                f"{len(ids)} prompt tokens and {max_new_tokens} new ones exceed the model's {longest} positions; "
                "shorten the prompt or ask for fewer tokens"
            )
        return ids


def _never_asked(layers: int, experts: int, _slots: int) -> Policy:
    """For caches that keep all experts or none, where any policy does and the cheapest is best."""
    return LRU(layers, experts)


def _tokenizer(path: Path):
    if not any((path / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    return AutoTokenizer.from_pretrained(path)


def _end_tokens(path: Path, config) -> frozenset[int]:
    """The ids that end a text: generation_config.json's if it names any, else config.json's."""
    file = path / "generation_config.json"
    named = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
    if named is None:
        named = getattr(config, "eos_token_id", None)
    if named is None:
        return frozenset()
    return frozenset([named] if isinstance(named, int) else named)
