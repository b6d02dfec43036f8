"""Opening a model folder: its modules, the cache of its experts, and room for keys and values."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

from checkpointing.keeper.memory import available_bytes
from inference.cache import ExpertCache
from inference.calibrate import ExpertKind
from inference.errors import InferenceError, NotCaptured
from inference.executor import Executor
from inference.experts import Arithmetic, OffloadedExperts
from inference.heads import Heads, has_heads, load_heads, tell_policy
from inference.kv import BLOCK_SIZE, KVShape, PagedKV
from inference.model import Forward, Model
from inference.offload import Crossing, open_executor
from inference.packing import why_not_packed
from inference.placement import KV_SHARE, KV_TOKENS, Placement, model_sizes, parse_size, place
from inference.policies import LRU, Policy
from inference.recording import RoutingRecorder
from inference.row_adapters import join_trees, obstacle
from inference.shadow import SAMPLED, WITH_HEADS, Hedge
from inference.skeleton import (
    activation,
    build_skeleton,
    check_surplus,
    expert_shape,
    load_dense,
    offload_experts,
    share_dense,
)
from inference.store import ExpertStore, TensorFiles
from lora.errors import AdapterError
from lora.exactness import needs_whole_prompts
from lora.format import apply_adapter, load_adapter
from moe.families import MoEBlock, find_moe_blocks
from moe.fingerprint import fingerprint
from moe.kernels.probe import runs_triton
from moe.tracefile import TraceHeader

MakePolicy = Callable[[int, int, int], Policy]  # (layers, experts, slots)


@dataclass(frozen=True)
class Base:
    """A model without adapters.

    ``cache`` is None for a dense model, ``executor`` where no link is to be crossed, ``heads`` without a use for them.
    """

    path: Path
    files: TensorFiles
    module: nn.Module
    cache: ExpertCache | None
    dtype: torch.dtype
    device: torch.device
    executor: Executor | None = None
    heads: Heads | None = None

    def begin(self) -> None:
        """A request is taken in: policies and predictors that follow sequences are told."""
        if self.executor is not None:
            self.executor.begin()
        elif self.cache is not None:
            self.cache.policy.begin()

    def close(self) -> None:
        """Files, and what host memory and threads an executor has."""
        if self.executor is not None:
            self.executor.close()
        if self.cache is not None:
            self.cache.store.forget()
        self.files.close()


def open_base(
    path: Path,
    expert_budget: float,
    device: torch.device,
    dtype: torch.dtype | None,
    poison: bool,
    policy: MakePolicy | None,
    crossing: Crossing | None = None,
    recorded: bool = False,
) -> Base:
    """Lookahead heads are opened where the default policy has to choose, and if routing is ``recorded``.

    Raises InferenceError if the folder or its heads are damaged or of no known kind, or the budget is out of range.
    """
    if not (isinstance(expert_budget, Real) and 0 <= expert_budget <= 1):
        raise InferenceError(f"expert budget {expert_budget!r} is out of range; give a share from 0 to 1, as 0.25")
    files = TensorFiles(path)
    module, blocks = build_skeleton(path, dtype)
    cache = executor = heads = None
    if blocks:
        cache = _expert_cache(path, files, blocks, expert_budget, device, poison, policy)
        crossing = crossing or Crossing()
        if has_heads(path) and (recorded or cache.policy.uses_heads or crossing.prefetch == "heads"):
            heads = _heads(path, cache, device)
        shape, top_k = cache.store.shape, module.config.num_experts_per_tok
        if not 1 <= top_k <= shape.num_experts:
            raise InferenceError(
                f"{path}: config.json chooses num_experts_per_tok={top_k} of {shape.num_experts} experts; mend it"
            )
        arithmetic = Arithmetic(shape.form, activation(blocks[0]), shape.biased)
        gates = [block.gate for block in blocks]
        part = None if heads is None else partial(heads.next_calls, lead=crossing.lead)
        executor = open_executor(cache, gates, top_k, arithmetic, crossing, part)
        offload_experts(blocks, cache, executor)
    elif expert_budget != 1:
        raise InferenceError(
            f"{path} is a dense model: it has no experts to leave in the files, so an expert budget of "
            f"{expert_budget} means nothing; leave it out (1: all of the model is resident)"
        )
    elif crossing is not None and crossing.asks:
        raise InferenceError(f"{path} is a dense model without experts: {crossing.asks} means nothing; leave it out")
    check_surplus(module, files, cache.store.names() if cache else ())
    load_dense(module, files, device)
    dtype_used = module.get_input_embeddings().weight.dtype
    return Base(path, files, module, cache, dtype_used, device, executor, heads)


def _expert_cache(
    path: Path,
    files: TensorFiles,
    blocks: list[MoEBlock],
    expert_budget: float,
    device: torch.device,
    poison: bool,
    policy: MakePolicy | None,
) -> ExpertCache:
    shape = expert_shape(path, blocks)
    store = ExpertStore(files, {b.layer: f"{b.path}.experts" for b in blocks}, shape)
    slots = max(round(expert_budget * store.total), 1) if expert_budget else 0
    dtype = blocks[0].experts.gate_up_proj.dtype
    chosen: Policy
    sizes = (len(store.layers), shape.num_experts, slots)
    if policy is not None:
        chosen = policy(*sizes)
    elif 0 < slots < store.total:
        stride = min(SAMPLED, len(store.layers)) if device.type == "cuda" else 1
        chosen = Hedge(*sizes, WITH_HEADS if has_heads(path) else None, stride=stride)
    else:
        chosen = _never_asked(*sizes)
    return ExpertCache(store, slots, device=device, dtype=dtype, policy=chosen, poison=poison)


def _heads(path: Path, cache: ExpertCache, device: torch.device) -> Heads:
    heads, manifest = load_heads(path, device)
    if (manifest.layers, manifest.num_experts) != (cache.store.layers, cache.store.shape.num_experts):
        raise InferenceError(f"{path}: its lookahead heads are for other layers or experts; train the heads again")
    return heads


def _never_asked(layers: int, experts: int, _slots: int) -> Policy:
    """For caches that keep all experts or none, where any policy does and the cheapest is best."""
    return LRU(layers, experts)


def adapt(base: Base, folders: Mapping[str, str | Path]) -> dict[str, nn.Module]:
    """For every adapter a module tree of its own over the weights of ``base``, with the adapter attached.

    Weights and resident experts exist once; a tree adds the adapter's factors and a few thousand Python objects.
    Raises AdapterError if an adapter is damaged or does not fit the model.
    """
    trees = {name: _tree_over(base) for name in folders}
    attach_all(base, trees, folders)
    return trees


def join(base: Base, trees: Mapping[str, nn.Module]) -> tuple[nn.Module, frozenset[str | None]] | None:
    """A tree that serves the rows of several adapters in one pass, and which ones; None if there are no two."""
    able: dict[str | None, nn.Module] = {name: tree for name, tree in trees.items() if not obstacle(tree)}
    if not able:
        return None
    joint = _tree_over(base)
    able[None] = base.module
    join_trees(joint, able)
    return joint, frozenset(able)


def _tree_over(base: Base) -> nn.Module:
    """Another tree of modules over the weights and the resident experts of ``base``."""
    module, blocks = build_skeleton(base.path, base.dtype)
    if base.cache is not None:
        offload_experts(blocks, base.cache, base.executor)
    share_dense(module, base.module)
    return module.to(base.device)


def attach_all(base: Base, trees: Mapping[str, nn.Module], folders: Mapping[str, str | Path]) -> None:
    """Attaches the adapter in each folder to the tree of its name."""
    if not folders:
        return
    # Reads the whole folder once: an adapter on another base gives fluent nonsense, never an error.
    known = fingerprint(base.path)
    for name, folder in folders.items():
        adapter = load_adapter(folder)
        if why := needs_whole_prompts(adapter.banks):
            raise AdapterError(f"{folder}: {why}; this runtime runs prompts once, in pieces; use transformers")
        apply_adapter(trees[name], adapter, base_fingerprint=known)
        trees[name].to(base.device)


def place_in(
    path: Path, vram: int | str, kv_tokens: int | None, device: torch.device, dtype: torch.dtype | None, pack: bool
) -> Placement:
    """What of ``vram`` bytes (or ``8GiB``) the dense part, keys and values and experts get.

    On a CPU the sizes are the same, but nothing is kept free for CUDA. Raises InferenceError with figures if they do
    not fit.
    """
    nbytes = parse_size(vram) if isinstance(vram, str) else vram
    sizes, gpu = model_sizes(path, None if dtype is None else str(dtype).removeprefix("torch.")), device.type == "cuda"
    kind = ExpertKind(sizes.hidden, sizes.intermediate, getattr(torch, sizes.dtype))
    pack = gpu and pack and why_not_packed(kind.layout, device) is None
    return place(sizes.kept(pack=pack), gpu=gpu, kv_tokens=kv_tokens, vram=nbytes)


def watch(base: Base, trees: Sequence[nn.Module], trace: str | Path | None) -> RoutingRecorder | None:
    """Has heads tell the policy what they see in every layer call of ``trees``, and the calls recorded in ``trace``.

    Raises InferenceError if the trace cannot be made.
    """
    recorder = None
    if trace is not None:
        if base.cache is None:
            raise InferenceError(f"{base.path} is a dense model: it routes no tokens, so there is no trace to record")
        config: Any = base.module.config
        store, top_k = base.cache.store, config.num_experts_per_tok
        header = TraceHeader(config.model_type, store.layers, store.shape.num_experts, top_k, source="serving")
        gates = [block.gate for block in find_moe_blocks(base.module)]
        recorder = RoutingRecorder(trace, header, base.heads, gates)
    hears = base.heads is not None and base.cache is not None and base.cache.policy.uses_heads
    if hears and base.executor is not None:
        base.executor.foresee = base.heads.ahead
    for tree in trees:
        experts = {m.layer: m for m in tree.modules() if isinstance(m, OffloadedExperts)}
        if recorder is not None:
            recorder.attach(experts)
        if hears and base.executor is None:
            tell_policy(base.heads, base.cache.policy, [experts[layer] for layer in base.cache.store.layers])
    return recorder


def open_kv(base: Base, kv_tokens: int | None, block_size: int = BLOCK_SIZE) -> PagedKV:
    """Room for the keys and values of ``kv_tokens``, rounded up to whole blocks.

    None: 32768 tokens, or as many as a quarter of the free memory of the device holds if that is less.
    Raises InferenceError if that is no room at all, or more than is free.
    """
    free = _free_bytes(base.device)
    per_block = PagedKV.bytes_per_block(base.module.config, base.dtype, block_size)
    if kv_tokens is None:
        affordable = int(KV_SHARE * free) // per_block
        blocks = min(-(-KV_TOKENS // block_size), affordable)
    else:
        blocks = -(-kv_tokens // block_size)
    if blocks < 1:
        raise InferenceError(
            f"kv_tokens={kv_tokens} leaves no room for keys and values: one block of {block_size} tokens takes "
            f"{per_block / 1e6:.2f} MB; give at least {block_size}, or free some memory of {base.device}"
        )
    if blocks * per_block > free:
        raise InferenceError(
            f"kv_tokens={kv_tokens}: keys and values of so many tokens take {blocks * per_block / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB of {base.device} are free; give {int(KV_SHARE * free) // per_block * block_size}"
        )
    return PagedKV(KVShape.of(base.module.config), blocks, block_size, device=base.device, dtype=base.dtype)


def _free_bytes(device: torch.device) -> int:
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else available_bytes()


def open_tokenizer(path: Path):
    """The folder's tokenizer, or None if it has none. Raises InferenceError if it is damaged."""
    if not any((path / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # transformers and tokenizers raise all kinds, bare Exception among them
        raise InferenceError(
            f"{path}: its tokenizer cannot be opened ({type(error).__name__}: {error}); copy tokenizer.json and "
            "tokenizer_config.json again"
        ) from error


def end_tokens(path: Path, config) -> frozenset[int]:
    """The ids that end a text: generation_config.json's if it names any, else config.json's.

    Raises InferenceError if that file is damaged, or names what is no token.
    """
    file = path / "generation_config.json"
    try:
        named = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
    except (OSError, ValueError, AttributeError) as error:
        raise InferenceError(f"{file}: not a generation config ({error!r}); copy it again, or remove it") from error
    if named is None:
        file, named = path / "config.json", getattr(config, "eos_token_id", None)
    ids = [] if named is None else named if isinstance(named, list) else [named]
    if wrong := [token for token in ids if type(token) is not int or not 0 <= token < config.vocab_size]:
        raise InferenceError(
            f"{file}: eos_token_id {wrong[0]!r} is no token of this model, whose ids are 0 to {config.vocab_size - 1}; "
            "no text would ever end: mend it"
        )
    return frozenset(ids)


def capture_steps(model: Model, base: Base, asked: bool | None, *, watched: bool) -> tuple[Forward, str]:
    """``model`` with its decode steps captured where they can be, and in a sentence which way it is.

    Args:
        asked: None: where they can be; True: raise InferenceError where they cannot; False: nowhere.
        watched: an adapter changes the base model's steps, or a trace records them.
    """
    if asked is False:
        return model, ""
    try:
        captured = _captured(model, base, watched=watched)
    except NotCaptured as error:
        if asked:
            raise
        return model, f"decode steps are not captured: {error.why}" if base.device.type == "cuda" else ""
    return captured, "decode steps of few sequences are captured as CUDA graphs, each of their shapes at its first step"


def _captured(model: Model, base: Base, *, watched: bool) -> Forward:
    if watched:
        raise NotCaptured(
            "graphs=True (--graphs) captures steps of the base model, whose routing nobody can watch then",
            "leave trace out, and give the adapter in adapters",
        )
    if base.executor is None or not runs_triton(base.device):
        raise NotCaptured(
            f"graphs=True (--graphs) captures decode steps of a mixture of experts on a GPU, with Triton; this is "
            f"{'a dense model' if base.cache is None else base.device}",
            "leave it out",
        )
    if base.heads is not None:
        raise NotCaptured(
            f"{base.path} has lookahead heads, which would look at every call of a captured step",
            "leave graphs out, give another policy, or take the folder's lookahead/ away",
        )
    graphed = importlib.import_module("inference.graphed")
    modules = [module for module in base.module.modules() if isinstance(module, OffloadedExperts)]
    captured: Forward = graphed.GraphedModel(model, modules, base.executor)
    return captured
