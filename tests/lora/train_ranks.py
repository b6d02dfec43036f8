"""What a rank of a real DeepSpeed job does that trains an adapter; test_ranks.py compares."""

from __future__ import annotations

import json
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.ops import __compatible_ops__
from torch import Tensor
from transformers import LlamaForCausalLM, Qwen3MoeForCausalLM

from lora.errors import AdapterError
from lora.format import apply_adapter, load_adapter
from lora.watch import AdapterWatch
from moe.context import batch_context
from moe.convert import convert
from moe.deepspeed_ep import bind_expert_parallel
from moe.layout import Layout
from tests.lora.rank_cases import CUT_OFF, PLANS, context_of, file_of, is_dense


def initialize(model: torch.nn.Module, stage: int) -> deepspeed.DeepSpeedEngine:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = split_params_into_different_moe_groups_for_optimizer([{"name": "all", "params": trained}])
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD([g for g in groups if g["params"]], lr=0.2),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": stage, "overlap_comm": False},
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
        },
        dist_init_required=False,
    )
    return engine


def total(flags: Tensor) -> Tensor:
    dist.all_reduce(flags)
    return flags


def train(folder: Path, case: str, ep: int, stage: int, rank: int, world: int) -> dict[str, object]:
    """Three steps of the case, whose values are saved; in one case then a step with an adapter cut off on one rank."""
    if is_dense(case):
        model, blocks = LlamaForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32), []
    else:
        model = Qwen3MoeForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        blocks = convert(model, Layout(world, ep), rank)
    apply_adapter(model, load_adapter(folder / f"adapter-{file_of(case)}"))
    for block in blocks:
        bind_expert_parallel(block.experts)
    engine = initialize(model, stage)
    watch = AdapterWatch(model)
    tokens_SBT = torch.load(folder / "tokens.pt")
    pending = []

    def step(tokens_BT: Tensor) -> None:
        mine = tokens_BT.chunk(world)[rank]
        with batch_context(context_of(mine)):
            engine.backward(engine(input_ids=mine, labels=mine).loss)
        engine.step()

    for tokens_BT in tokens_SBT:
        step(tokens_BT)
        pending.append(watch.check(reduce=total))
    result: dict[str, object] = {"pending": pending, "done": watch.done}
    values = {p.address.param: p.detach().clone() for p in model.parameters() if p.requires_grad}
    torch.save(values, folder / f"trained-{file_of(case, world, ep)}-{stage}-{rank}.pt")
    if case != CUT_OFF:
        return result

    watch = AdapterWatch(model)
    if rank == world - 1:
        blocks[0].experts.wanted_backend = "grouped_mm"  # in pieces, of which one is cut off
        adapter = blocks[0].experts.adapter
        adapter.down_delta = lambda a, counts, f=adapter.down_delta: f(a, counts) * 0
    step(tokens_SBT[0])
    try:
        watch.check(reduce=total)
    except AdapterError as error:
        result["error"] = str(error)
    return result


def train_all(rank: int, world: int, folder: Path) -> None:
    """What rank_cases.py plans for so many ranks, with ZeRO-1, then with ZeRO-2."""
    __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", dist_init_required=False)
    for case, ep in PLANS[world]:
        for stage in (1, 2):
            result = train(folder, case, ep, stage, rank, world)
            (folder / f"result-{file_of(case, world, ep)}-{stage}-{rank}.json").write_text(json.dumps(result))
