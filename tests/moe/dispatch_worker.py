"""What a rank does: every dispatcher against one process that has all experts, forward and backward.

Every rank draws the whole problem from one seed and takes its share. Rank 0 writes, into the file given, the largest
relative error over all ranks of each result, whether repetitions gave the same bits, and what the host read.
"""

import itertools
import json
import os
import sys
import types
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

import moe.exchange
import moe.experts
from lora.config import BankConfig
from lora.experts import ExpertLoRA, ExpertSlice
from lora.presets import bank_at
from moe.convert import convert
from moe.experts import Experts
from moe.form import PLAIN, ExpertForm
from moe.kernels import backend, batched
from moe.layout import Layout
from moe.overlap import set_exchange
from moe.traffic import traffic_of
from tests.moe.stream_order import watched
from trainer.rendezvous import join

GPT_OSS = ExpertForm(transposed=True, interleaved=True, limit=7.0)
HIDDEN, INNER = 12, 8  # divisible by 4, for torch's grouped product
# As on a GPU, where rows are gathered and sent before anybody knows how many there are.
EARLY = types.SimpleNamespace(**{**vars(batched), "queues_early": lambda x_RH: True})
# How tokens travel, and what computes them: by default the experts' loops, also own tokens and others' apart.
METHODS = {
    "all_to_all": ("all_to_all", {}),
    "deduplicated": ("deduplicated", {}),
    "deduplicated, for a GPU": ("deduplicated", {"passes": lambda site, name: batched}),
    "deduplicated, early": ("deduplicated", {"passes": lambda site, name: EARLY}),
    "deduplicated, in phases": ("deduplicated", {"wanted_backend": "grouped_mm"}),
}


@dataclass(frozen=True)
class Case:
    """``tokens``: of each rank, repeated as often as needed. ``reach``: into how many experts they are routed."""

    top_k: int
    per_rank: int = 4  # experts
    tokens: tuple[int, ...] = (13, 7)
    reach: int | None = None
    form: ExpertForm = PLAIN
    biased: bool = False
    adapter: bool = False
    frozen: bool = False
    recompute: bool = False


CASES = {
    "one choice": Case(1),
    "two choices": Case(2),
    "eight choices": Case(8, per_rank=5),
    "one expert a rank": Case(2, per_rank=1),
    "an empty rank": Case(3, reach=4),
    "no tokens on a rank": Case(2, tokens=(9, 0)),
    "one token": Case(2, tokens=(1, 0)),
    "no tokens at all": Case(2, tokens=(0,)),
    "gpt_oss": Case(4, form=GPT_OSS, biased=True),
    "adapter": Case(3, adapter=True),
    "adapter, frozen": Case(3, adapter=True, frozen=True),
    "frozen": Case(2, frozen=True),
    "recomputed": Case(2, recompute=True, tokens=(6, 0)),
    "skewed": Case(2, tokens=(40, 3), reach=3),
    "all experts elsewhere": Case(2, tokens=(5, 0), reach=4),
}


INTERPRETED = ("eight choices", "an empty rank", "no tokens on a rank", "gpt_oss", "recomputed")  # each takes seconds


def whole(case, experts, first=0, local=None):
    """The experts ``first`` to ``first + local`` of a seeded set, with an adapter whose B is not zero."""
    local = local or experts
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.nn.Parameter(torch.randn(experts, *shape, generator=generator)[first : first + local].clone())

    up = (HIDDEN, 2 * INNER) if case.form.transposed else (2 * INNER, HIDDEN)
    down = (INNER, HIDDEN) if case.form.transposed else (HIDDEN, INNER)
    parts = [draw(*up), draw(*down)]
    biases = {"gate_up_bias": draw(2 * INNER), "down_bias": draw(HIDDEN)} if case.biased else {}
    module = Experts(*parts, case.form, layer=0, first_expert=first, num_experts=experts, **biases)
    module.requires_grad_(not case.frozen)
    if case.adapter:
        factors = {"gate_up_proj": (2, 4.0), "down_proj": (3, 3.0)}
        module.adapter = ExpertLoRA("a", ExpertSlice(0, experts, first, local), HIDDEN, INNER)
        for name, (r, alpha) in factors.items():
            module.adapter.add(name, bank_at(BankConfig("expert-lora", r=r, alpha=alpha), 0, 1, experts))
            b = getattr(module.adapter, name).B
            b.data = torch.randn(experts, *b.shape[1:], generator=generator)[first : first + local].clone()
    return module


def problem(case, experts, ranks):
    """Tokens, routing and upstream gradients of every rank."""
    generator = torch.Generator().manual_seed(4)
    for rank in range(ranks):
        num = case.tokens[rank % len(case.tokens)]
        order = torch.rand(num, case.reach or experts, generator=generator).argsort(1)
        yield (
            torch.randn(num, HIDDEN, generator=generator),
            order[:, : case.top_k],
            torch.rand(num, min(case.top_k, order.shape[1]), generator=generator),
            torch.randn(num, HIDDEN, generator=generator),
        )


def run(module, case, x, index, weights, upstream):
    """Output and all gradients by name."""
    module.zero_grad()
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    out = checkpoint(module, x, index, weights, use_reentrant=False) if case.recompute else module(x, index, weights)
    out.backward(upstream)
    found = {"out": out.detach(), "x": x.grad, "weights": weights.grad}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            found[name] = parameter.grad
    return found


def made_for(module, method, group):
    """Tell the experts how to exchange tokens."""
    module.ep_group = group
    module.dispatch, how = METHODS[method]
    module.wanted_backend = how.get("wanted_backend", "auto")
    moe.experts.passes = how.get("passes", backend.passes)


def compare(case, method, group):
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    experts = case.per_rank * ranks
    shares = list(problem(case, experts, ranks))
    start = sum(share[0].shape[0] for share in shares[:rank])
    tokens = slice(start, start + shares[rank][0].shape[0])
    mine = slice(rank * case.per_rank, (rank + 1) * case.per_rank)
    want = run(whole(case, experts), case, *(torch.cat(parts) for parts in zip(*shares, strict=True)))
    module = whole(case, experts, mine.start, case.per_rank)
    made_for(module, method, group)
    got = run(module, case, *shares[rank])
    again = run(module, case, *shares[rank])
    errors = {}
    for name, value in want.items():
        value = value[tokens if name in ("out", "x", "weights") else mine]
        assert got[name] is not None, f"{name} has no gradient on rank {rank}"
        errors[name] = float((got[name] - value).norm() / value.norm().clamp(min=1e-12))
    with torch.no_grad():
        evaluated = module(*shares[rank][:3])
    same = all(torch.equal(got[name], again[name]) for name in got) and torch.equal(evaluated, got["out"])
    return {"errors": errors, "same": same}


class HostReads(TorchFunctionMode):
    """Counts what would wait for a GPU."""

    NAMES = ("tolist", "item", "nonzero", "masked_select", "unique", "__bool__", "__int__", "__index__", "cpu", "numpy")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self.NAMES:
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


def host_reads(method, group):
    """Of one layer, forward and backward, without the experts' own."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    case = CASES["two choices"]
    share = list(problem(case, case.per_rank * ranks, ranks))[rank]
    module = whole(case, case.per_rank * ranks, rank * case.per_rank, case.per_rank)
    made_for(module, method, group)
    # The loops read; what stands for experts here does not.
    module.mix = lambda x_RH, weights_RC, assignment: x_RH * weights_RC.sum(1, keepdim=True)
    x, weights = share[0].clone().requires_grad_(), share[2].clone().requires_grad_()
    with HostReads() as reads:
        module(x, share[1], weights).backward(share[3])
    return reads.seen


def as_on_a_gpu(group, watch, expected=None, backward=True):
    """A layer inside ``watch``, forward and backward.

    Args:
        expected: what is queued before counts are known: own pairs, rows that leave, and rows that are sent.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    case = CASES["eight choices"]
    share = list(problem(case, case.per_rank * ranks, ranks))[rank]
    module = whole(case, case.per_rank * ranks, rank * case.per_rank, case.per_rank)
    made_for(module, "deduplicated, early" if expected else "deduplicated, for a GPU", group)
    x, weights = share[0].clone().requires_grad_(), share[2].clone().requires_grad_()
    traffic = traffic_of(group, module.layer)
    traffic.pairs, traffic.leaving, traffic.ahead = expected or (0, 0, 0)
    with watch:
        out = module(x, share[1], weights)
        if backward:
            out.backward(share[3])


def too_early(group, expected=None, joins=True):
    """What a layer would read too early on a GPU."""
    with watched(joins) as streams:
        as_on_a_gpu(group, nullcontext(), expected)
    return streams.wrong


def kept_bytes(group, expected=None):
    """What a layer keeps for its backward pass."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    as_on_a_gpu(group, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), expected)
    return sum(kept.values())


def order_of_sending(group, expected):
    """Exchanges of the forward pass (``>``), and the reading of counts (``r``)."""
    done, send, read = [], moe.exchange.all_to_all, moe.exchange.Headcount.read
    moe.exchange.all_to_all = lambda *args: done.append(">") or send(*args)
    moe.exchange.Headcount.read = lambda self: done.append("r") or read(self)
    try:
        with torch.no_grad():
            as_on_a_gpu(group, nullcontext(), expected, backward=False)
    finally:
        moe.exchange.all_to_all, moe.exchange.Headcount.read = send, read
    return "".join(done)


FAMILIES = {
    "qwen2_moe": {"shared_expert_intermediate_size": 12, "num_experts": 8, "num_key_value_heads": 1},
    "deepseek_v2": {"n_shared_experts": 1, "n_routed_experts": 8, "first_k_dense_replace": 0, "q_lora_rank": None,
                    "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "n_group": 2,
                    "topk_group": 1},
    "deepseek_v3": {"n_shared_experts": 1, "n_routed_experts": 8, "first_k_dense_replace": 0, "q_lora_rank": None,
                    "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "n_group": 2,
                    "topk_group": 1},
}  # fmt: skip


def tiny(family):
    config = AutoConfig.for_model(
        family, vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        moe_intermediate_size=12, num_experts_per_tok=2, max_position_embeddings=32,
        bos_token_id=None, eos_token_id=None, pad_token_id=None, **FAMILIES[family],
    )  # fmt: skip
    torch.manual_seed(6)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def gradients(model, ids):
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def overlapped(family, group):
    """A model whose shared expert runs while tokens travel, against the same without, and against one process."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    ids = torch.randint(0, 31, (ranks, 9), generator=torch.Generator().manual_seed(7))
    found = {}
    for name in ("none", "shared", "shared again", "shared recomputed", "none recomputed"):
        model = tiny(family)
        if name.endswith("recomputed"):
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        blocks = convert(model, Layout(ranks, ranks), rank)
        set_exchange(blocks, 2, overlap=name.partition(" ")[0])
        for block in blocks:
            block.experts.ep_group = group
        found[name] = gradients(model, ids[rank : rank + 1])
    want = gradients(tiny(family), ids)
    errors = {}
    for overlap, got in found.items():
        for name, value in got.items():
            if ".experts." in name:
                local = value.shape[0]
                value, whole_value = value / ranks, want[name][rank * local : (rank + 1) * local]
            else:
                dist.all_reduce(value := value / ranks, group=group)
                whole_value = want[name]
            errors[f"{overlap} {name}"] = float((value - whole_value).norm() / whole_value.norm().clamp(min=1e-12))
    same = all(torch.equal(found["shared"][name], value) for name, value in found["shared again"].items())
    same = same and torch.equal(found["shared"]["loss"], found["none"]["loss"])
    return {"errors": errors, "same": same}


def agreed(results):
    """Of all ranks' answers to the same questions, the worst."""
    return {
        "errors": {name: max(one["errors"][name] for one in results) for name in results[0]["errors"]},
        "same": all(one["same"] for one in results),
    }


def interpret_with_new_numpy():
    """Triton 3.6 interprets a loop's bound as int(array of one element), which NumPy has refused since 2.4."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def gather(found):
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, found)
    return every


def report(rank, world, ep, out):
    """Of ranks that share a set of experts among every ``ep`` of them."""
    groups = [dist.new_group(range(first, first + ep)) for first in range(0, world, ep)]
    group = groups[rank // ep]
    report = {"cases": {}, "families": {}, "reads": {}}
    cases = itertools.product(CASES, METHODS)
    if os.environ.get("TRITON_INTERPRET"):
        interpret_with_new_numpy()
        cases = itertools.product(INTERPRETED, ["deduplicated, for a GPU"])
    for name, method in cases:
        found = compare(CASES[name], method, group)
        report["cases"][f"{name}, {method}"] = agreed(gather(found))
    for method in ("all_to_all", "deduplicated, for a GPU", "deduplicated, in phases"):
        report["reads"][method] = gather(host_reads(method, group))
    if not os.environ.get("TRITON_INTERPRET"):  # whose kernels nobody sees
        # Too many of all, too few, and none that are sent ahead.
        early = [(*many, ahead if ep == 2 else 0) for many, ahead in (((104, 26), 26), ((5, 3), 3), ((104, 26), 0))]
        report["too early"] = {
            "late": gather(too_early(group)),
            **{f"early, {expected}": gather(too_early(group, expected)) for expected in early},
            "not joined": gather(too_early(group, early[0], joins=False)),
        }
        late, last = kept_bytes(group), traffic_of(group, 0)
        again, ahead = (last.pairs, last.leaving, last.ahead), 400 if ep == 2 else 0
        report["kept"] = {
            "as last time": gather((late, kept_bytes(group, again))),
            "much less than last time": gather((late, kept_bytes(group, (800, 400, ahead)))),
        }
        ways = {"nothing": (1, 0, 0), "enough": early[0], "too few": early[1]} if ep == 2 else {}
        report["order"] = {how: gather(order_of_sending(group, expected))[:2] for how, expected in ways.items()}
    moe.experts.passes = backend.passes
    for family in () if os.environ.get("TRITON_INTERPRET") else FAMILIES:
        report["families"][family] = agreed(gather(overlapped(family, group)))
    if rank == 0:
        out.write_text(json.dumps(report))


if __name__ == "__main__":  # under torchrun, for what must be known before Triton is imported
    torch.set_num_threads(1)
    process = join("cpu", timedelta(seconds=100))
    report(process.rank, process.world, int(sys.argv[2]), Path(sys.argv[1]))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)
