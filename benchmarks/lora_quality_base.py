"""The small frozen model that all arms adapt: pretrained here on other tasks, and kept under a key of its causes.

Shapes: B samples, S tokens of a sample.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import lora_quality_tasks
from benchmarks.lora_quality_tasks import LENGTH, OLD, VOCABULARY, Batch, TaskSet
from benchmarks.machine import say


@dataclass(frozen=True)
class BaseSetting:
    """What decides the base.

    Attributes:
        stages: (examples in a sample, steps) in turn. Two examples teach what an example is good for sooner than one;
            adapters are trained with as many as the last stage has.
    """

    hidden: int = 64
    intermediate: int = 128
    layers: int = 4
    heads: int = 4
    stages: tuple[tuple[int, int], ...] = ((2, 3000), (1, 600))
    batch: int = 64
    lr: float = 3e-3
    seed: int = 0

    @property
    def examples(self) -> int:
        return self.stages[-1][0]


def key_of(setting: BaseSetting, device: torch.device) -> str:
    """Changes with everything that the base's weights depend on: setting, code, versions, kind of device."""
    causes = [
        json.dumps(asdict(setting), sort_keys=True),
        inspect.getsource(lora_quality_tasks),
        inspect.getsource(_pretrain),
        inspect.getsource(new_model),
        torch.__version__,
        transformers.__version__,
        device.type,
    ]
    return hashlib.sha256("\0".join(causes).encode()).hexdigest()[:16]


def new_model(setting: BaseSetting) -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setting.seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=setting.hidden,
                intermediate_size=setting.intermediate,
                num_hidden_layers=setting.layers,
                num_attention_heads=setting.heads,
                num_key_value_heads=setting.heads,
                max_position_embeddings=256,
                tie_word_embeddings=False,
                bos_token_id=lora_quality_tasks.BOS,
                eos_token_id=None,
                pad_token_id=None,
            )
        )


def answer_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of the scored tokens."""
    logits_BSV = model(input_ids=batch.tokens_BS[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits_BSV[batch.scored_BS[:, 1:]], batch.tokens_BS[batch.scored_BS])


@torch.no_grad()
def solved(model: nn.Module, batch: Batch) -> Tensor:
    """Whether greedy decoding would give the query's whole answer, [B] bool.

    One pass over the true answer decides it: decoding departs from the truth at the first token whose prediction after
    the true prefix is wrong, and until then it has the true prefix.
    """
    logits_BSV = model(input_ids=batch.tokens_BS[:, :-1], use_cache=False).logits
    return (logits_BSV[:, -LENGTH:].argmax(-1) == batch.tokens_BS[:, -LENGTH:]).all(1)


def by_task(found_B: Tensor, batch: Batch) -> list[float]:
    """The mean over each task's samples."""
    tasks = int(batch.task_B.max()) + 1
    return found_B.double().view(tasks, -1).mean(1).tolist()


def schedule(step: int, steps: int, warmup: int) -> float:
    """Factor of the learning rate: up over ``warmup`` steps, then down to a tenth in a straight line."""
    return min(1.0, (step + 1) / warmup) * (1 - 0.9 * step / steps)


def frozen_base(setting: BaseSetting, folder: Path, device: torch.device) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """The base and what is known of it, from ``folder`` if it is there, else pretrained and put there."""
    place = folder / f"base-{key_of(setting, device)}"
    weights, facts = place.with_suffix(".safetensors"), place.with_suffix(".json")
    model = new_model(setting).to(device)
    if not facts.exists():
        folder.mkdir(parents=True, exist_ok=True)
        found = _pretrain(model, setting, device)
        for path, write in ((weights, _write_weights(model)), (facts, lambda p: p.write_text(json.dumps(found)))):
            write(path.with_suffix(".part"))
            path.with_suffix(".part").rename(path)  # facts last: they say that the weights are whole
    model.load_state_dict(load_file(weights, device=str(device)))
    return model.requires_grad_(False), json.loads(facts.read_text())


def _write_weights(model: nn.Module):
    return lambda path: save_file({name: t.contiguous() for name, t in model.state_dict().items()}, path)


def _pretrain(model: nn.Module, setting: BaseSetting, device: torch.device) -> dict[str, Any]:
    started = time.monotonic()
    for examples, steps in setting.stages:
        tasks = TaskSet(OLD, examples)
        optimizer = torch.optim.AdamW(model.parameters(), lr=setting.lr, betas=(0.9, 0.98), weight_decay=0.01)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = setting.lr * schedule(step, steps, 100)
            loss = answer_loss(model, tasks.batch(setting.batch, seed=setting.seed * 10**8 + step).to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if (step + 1) % 500 == 0:
                say(f"base: {examples} examples, step {step + 1}, {time.monotonic() - started:.0f} s, loss {loss:.3f}")
    held_out = tasks.batch(len(OLD) * 64, seed=10**12).to(device)
    scores = dict(zip((task.name for task in OLD), by_task(solved(model, held_out), held_out), strict=True))
    return {"seconds": time.monotonic() - started, "solves": scores, "setting": asdict(setting)}


def twin(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A model of its own to put adapters on."""
    return copy.deepcopy(model)
