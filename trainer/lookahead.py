"""`planaria lookahead train RUN OUT`: distil lookahead heads from an exported model's routing on the run's own text.

`planaria lookahead record RUN OUT TRACE` has the model read held-out text, and records how it was routed.

The same RUN, OUT and settings give the same heads, bit for bit, on one machine with one number of threads.

Shapes: N sequences of S tokens, H hidden, K choices, L MoE layers (by row), E experts, R rank; P = S - 4 positions of a
sequence of which all four next turns are known; O = 2 * L * E.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from inference.errors import InferenceError
from inference.foresight import HORIZONS
from inference.heads import FOLDER, Heads, has_heads, load_heads, save_heads
from inference.opening import open_tokenizer
from inference.recording import RoutingRecorder
from moe.families import FamilyError, MoEBlock, find_moe_blocks
from moe.tracefile import TraceHeader
from trainer import data as data_module
from trainer.chat_data import ChatDataset
from trainer.data import PackedDataset
from trainer.recipe import load_recipe

LONGEST = max(HORIZONS)
BATCH = 256
HELDOUT_SEQUENCES = 64


@dataclass(frozen=True)
class Settings:
    """``tokens`` of the training part are read; each layer's heads then pass over them ``epochs`` times."""

    tokens: int = 65536
    rank: int = 64
    epochs: int = 3
    lr: float = 3e-3
    seed: int = 0


@dataclass(frozen=True)
class Reading:
    """What a model did while it read: each layer's input ``x_NSLH``, in bf16, and what it chose."""

    x_NSLH: Tensor
    index_NSLK: Tensor
    num_experts: int

    def used(self) -> Tensor:
        """Whether a token used an expert, bool [N,S,L,E]."""
        used = torch.zeros(*self.index_NSLK.shape[:3], self.num_experts, dtype=torch.bool)
        return used.scatter_(3, self.index_NSLK.long(), True)


def train(run_dir: str, out_dir: str, settings: Settings) -> int:
    """Make the heads of ``out_dir`` and say how good they are. Returns the exit status. Raises InferenceError."""
    started = time.perf_counter()
    model, blocks = _open(out_dir)
    training, heldout = _texts(run_dir, out_dir)
    count = max(1, min(len(training), -(-settings.tokens // training.sequence_length)))
    stride = len(training) // count
    reading = read(model, blocks, [training[i * stride] for i in range(count)])
    seconds = time.perf_counter() - started
    tokens = reading.x_NSLH.shape[0] * reading.x_NSLH.shape[1]
    print(f"{tokens:,} tokens of {run_dir}'s training part read in {seconds:.0f} s", flush=True)
    heads = distil(reading, settings)
    known = read(model, blocks, [heldout[i] for i in range(min(len(heldout), HELDOUT_SEQUENCES))])
    report = judge(heads, known)
    facts = {"tokens": tokens, "seed": settings.seed, "epochs": settings.epochs, "lr": settings.lr, "heldout": report}
    manifest = save_heads(heads, out_dir, tuple(block.layer for block in blocks), facts)
    size = sum(t.numel() for t in (heads.inward_LHR, heads.outward_LRO, heads.bias_LO))
    print(
        f"{Path(out_dir) / FOLDER}: heads of rank {manifest.rank}, {size:,} numbers, in "
        f"{time.perf_counter() - started:.0f} s\n"
        f"recall on {known.index_NSLK[:, :, 0, 0].numel():,} held-out tokens, as many guesses as choices: next layer "
        f"{report['next_layer']:.1%}, next token {report['next_token']:.1%}, which by what the last token used is "
        f"{report['same_as_last']:.1%}"
    )
    return 0


def record(run_dir: str, out_dir: str, trace: str, tokens: int) -> int:
    """Record how ``out_dir`` routes held-out text, with what its heads say if it has any. Raises InferenceError."""
    model, blocks = _open(out_dir)
    _, heldout = _texts(run_dir, out_dir)
    count = max(1, min(len(heldout), tokens // heldout.sequence_length))
    stride = len(heldout) // count
    heads = load_heads(out_dir)[0].to(model.device) if has_heads(out_dir) else None
    layers = tuple(block.layer for block in blocks)
    top_k = model.config.num_experts_per_tok
    header = TraceHeader(model.config.model_type, layers, _num_experts(blocks), top_k, source="text")
    recorder = RoutingRecorder(trace, header, heads, [block.gate for block in blocks])
    recorder.attach({block.layer: block.experts for block in blocks})
    try:
        with torch.inference_mode():
            for i in range(count):
                recorder.begin()
                _pass(model, heldout[i * stride])
    finally:
        recorder.close()
    if recorder.failure is not None:
        raise InferenceError(f"{recorder.failure}; make room and record again")
    said = "with what its heads say" if heads is not None else "it has no lookahead heads"
    print(f"{trace}: {count * heldout.sequence_length:,} held-out tokens of {run_dir} through {out_dir}, {said}")
    return 0


def _open(folder: str) -> tuple[PreTrainedModel, list[MoEBlock]]:
    if not (Path(folder) / "config.json").is_file():
        raise InferenceError(f"{folder} holds no config.json; give the folder that `planaria export RUN OUT` wrote")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=None if device.type == "cuda" else torch.float32)
    try:
        return model.eval().to(device), find_moe_blocks(model)
    except FamilyError as error:
        raise InferenceError(f"{folder}: {error}") from error


def _texts(run_dir: str, out_dir: str) -> tuple[PackedDataset, PackedDataset]:
    """The training and held-out parts of what the run reads, in tokens that are the exported model's, too."""
    path = Path(run_dir) / "recipe.yaml"
    if not path.is_file():
        raise InferenceError(f"{run_dir} holds no recipe.yaml; give the folder of the run that was exported")
    bundle = data_module.load(load_recipe(str(path), []))
    _check_tokens(run_dir, bundle.tokenizer_dir, out_dir)
    if isinstance(bundle.train, ChatDataset) or isinstance(bundle.heldout, ChatDataset):
        raise InferenceError(f"{run_dir} trained on chat; lookahead heads are distilled from format text or jsonl")
    if bundle.train.sequence_length <= LONGEST:
        raise InferenceError(
            f"{run_dir}: sequences of {bundle.train.sequence_length} tokens; heads need more than {LONGEST}"
        )
    return bundle.train, bundle.heldout


def _check_tokens(run_dir: str, tokenizer: Path, out_dir: str) -> None:
    own, theirs = open_tokenizer(Path(out_dir)), open_tokenizer(tokenizer)
    if own is None or own.get_vocab() != theirs.get_vocab():
        raise InferenceError(
            f"{out_dir} has {'no' if own is None else 'another'} tokenizer than {run_dir}: its model would read other "
            "tokens than it knows; give the run that it was exported from"
        )


def _num_experts(blocks: list[MoEBlock]) -> int:
    return int(blocks[0].experts.num_experts)


def _pass(model: PreTrainedModel, tokens_S: Any) -> None:
    model(input_ids=torch.as_tensor(tokens_S, device=model.device)[None], use_cache=False)


def read(model: PreTrainedModel, blocks: list[MoEBlock], sequences: list[Any]) -> Reading:
    """Have the model read sequences of one length, one after the other."""
    hidden, index = [], []
    with torch.inference_mode():
        for tokens_S in sequences:
            with _watched(blocks) as seen:
                _pass(model, tokens_S)
            hidden.append(torch.stack([x_SH for x_SH, _ in seen], 1))
            index.append(torch.stack([index_SK for _, index_SK in seen], 1))
    # Out of inference mode, so that heads may be fitted to it.
    return Reading(torch.stack(hidden).clone(), torch.stack(index).clone(), _num_experts(blocks))


@contextmanager
def _watched(blocks: list[MoEBlock]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The input and the choices of each layer's experts in one pass, in order."""
    seen: list[tuple[Tensor, Tensor]] = []

    def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = dict(zip(("hidden_states", "top_k_index"), args, strict=False)) | kwargs
        x = given["hidden_states"]
        x_SH = x.reshape(-1, x.shape[-1])
        seen.append((x_SH.cpu().to(torch.bfloat16), given["top_k_index"].cpu().to(torch.int32)))

    handles = [block.experts.register_forward_pre_hook(hook, with_kwargs=True) for block in blocks]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def targets(used_NSLE: Tensor, row: int) -> Tensor:
    """What came true of layer ``row``'s calls, bool [N,P,2,L,E]: each expert used in its layer's next turn, or four.

    For layers below ``row`` in the pass the next turn is in the same token, for the others in the next one.
    """
    positions = used_NSLE.shape[1] - LONGEST
    turns = [used_NSLE[:, k : k + positions] for k in range(LONGEST + 1)]
    same_L1 = (torch.arange(used_NSLE.shape[2]) > row)[:, None]
    found = []
    for horizon in HORIZONS:
        this = torch.stack(turns[:horizon]).any(0)
        later = torch.stack(turns[1 : horizon + 1]).any(0)
        found.append(torch.where(same_L1, this, later))
    return torch.stack(found, 2)


def distil(reading: Reading, settings: Settings) -> Heads:
    """Fit every layer's maps by the logistic loss of both horizons, with AdamW and a rate that falls to 0."""
    used_NSLE = reading.used()
    layers, hidden = reading.x_NSLH.shape[2:]
    rank = min(settings.rank, hidden)
    maps = []
    for row in range(layers):
        x_MH = reading.x_NSLH[:, :-LONGEST, row].reshape(-1, hidden).float()
        came_MO = targets(used_NSLE, row).flatten(0, 1).flatten(1)
        maps.append(_fit(x_MH, came_MO, rank, settings, settings.seed * 1000 + row))
    inward_LHR, outward_LRO, bias_LO = (torch.stack(parts) for parts in zip(*maps, strict=True))
    return Heads(inward_LHR, outward_LRO, bias_LO, reading.num_experts)


def _fit(x_MH: Tensor, came_MO: Tensor, rank: int, settings: Settings, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """One layer's maps. Inputs are standardised while fitting; the maps that are returned take them as they are."""
    generator = torch.Generator().manual_seed(seed)
    mean_H, scale_H = x_MH.mean(0), x_MH.std(0) + 1e-6
    inward_HR = torch.randn(x_MH.shape[1], rank, generator=generator) / x_MH.shape[1] ** 0.5
    outward_RO = torch.randn(rank, came_MO.shape[1], generator=generator) * 0.1 / rank**0.5
    bias_O = came_MO.float().mean(0).clamp(1e-3, 1 - 1e-3).logit()
    trained = [inward_HR.requires_grad_(), outward_RO.requires_grad_(), bias_O.requires_grad_()]
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=1e-3)
    batches = max(len(x_MH) // BATCH, 1)
    steps, step = settings.epochs * batches, 0
    for _ in range(settings.epochs):
        order_M = torch.randperm(len(x_MH), generator=generator)
        for batch_B in order_M[: batches * BATCH].chunk(batches):
            optimizer.param_groups[0]["lr"] = settings.lr * (1 - step / steps)
            step += 1
            z_BO = ((x_MH[batch_B] - mean_H) / scale_H) @ inward_HR @ outward_RO + bias_O
            loss = nn.functional.binary_cross_entropy_with_logits(z_BO, came_MO[batch_B].float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        inward_HR = inward_HR / scale_H[:, None]
        return inward_HR, outward_RO.detach(), bias_O - (mean_H @ inward_HR) @ outward_RO


def judge(heads: Heads, known: Reading) -> dict[str, float]:
    """Recall among as many guesses as a token has choices, over all layers: of the next layer's experts in the same
    token, and of each layer's own in the next token; beside it what the last token used."""
    used_NSLE = known.used()
    layers, choices = known.index_NSLK.shape[2:]
    found = {"next_layer": [0, 0], "next_token": [0, 0]}
    for row in range(layers):
        x_NSH = known.x_NSLH[:, :-LONGEST, row].float()
        z = (x_NSH @ heads.inward_LHR[row] @ heads.outward_LRO[row] + heads.bias_LO[row]).unflatten(-1, (2, layers, -1))
        came_NPLE = targets(used_NSLE, row)[:, :, 0]
        for what, target in (("next_layer", row + 1), ("next_token", row)):
            if target < layers:
                guess = z[:, :, 0, target].topk(choices, -1).indices
                found[what][0] += int(came_NPLE[:, :, target].gather(-1, guess).sum())
                found[what][1] += int(came_NPLE[:, :, target].sum())
    same = (used_NSLE[:, 1:] & used_NSLE[:, :-1]).sum() / used_NSLE[:, 1:].sum()
    return {what: right / max(wanted, 1) for what, (right, wanted) in found.items()} | {"same_as_last": float(same)}
