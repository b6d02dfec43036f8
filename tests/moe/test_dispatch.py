"""Dispatchers: their index arithmetic with a simulated exchange, and real gloo ranks against one process."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from moe import exchange as exchange_module
from moe.assignment import assign
from moe.convert import convert
from moe.copies import DeduplicatedDraft, PlainDraft, narrow_type
from moe.dispatch import AllToAll, Routed, mix_everywhere
from moe.dispatch_choice import choose_dispatch
from moe.exchange import Flight, Going
from moe.families import FamilyError, find_moe_blocks
from moe.guests import mix_with_guests
from moe.kernels import batched
from moe.kernels.probe import has_triton
from moe.kernels.stack import Stack
from moe.layout import Layout
from moe.overlap import set_exchange, shared_expert_of
from moe.traffic import Traffic, traffic_of
from tests.forked import run_ranks
from tests.moe import dispatch_worker
from tests.moe.layers import Case
from trainer.launch import worker_environment

HERE = Path(__file__).parent
METHODS = ("all_to_all", "deduplicated")


@st.composite
def routings(draw):
    """Of every rank, choices [T,K]; ranks may have no tokens, experts may get none."""
    ranks, num_local = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    experts = ranks * num_local
    reach = draw(st.integers(1, experts))
    top_k = draw(st.integers(1, reach))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    tokens = draw(st.lists(st.integers(0, 6), min_size=ranks, max_size=ranks))
    return num_local, [torch.rand(t, reach, generator=generator).argsort(1)[:, :top_k] for t in tokens]


def routes_of(method, num_local, indices):
    """Every rank's route; the counts are exchanged here."""
    ranks = len(indices)
    if method == "all_to_all":
        drafts = [PlainDraft.of(index, ranks, num_local) for index in indices]
    else:
        drafts = [DeduplicatedDraft.of(index, ranks, num_local, rank) for rank, index in enumerate(indices)]
    sent = [draft.counts_W2.tolist() for draft in drafts]
    received = [[sent[source][rank] for source in range(ranks)] for rank in range(ranks)]
    return [draft.route(*counts) for draft, *counts in zip(drafts, sent, received, strict=True)]


def exchange(routes, tensors, back=False):
    """What every rank receives of every rank's rows."""
    splits = [list(r.received if back else r.sent) for r in routes]
    parts = [t.split(split) for t, split in zip(tensors, splits, strict=True)]
    return [torch.cat([parts[source][rank] for source in range(len(routes))]) for rank in range(len(routes))]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(METHODS), routings())
def test_every_token_meets_exactly_its_own_experts_and_weights(method, routing):
    """A token's row is its number, an expert's work is to add ``number * expert``: the sum tells who met whom."""
    num_local, indices = routing
    routes = routes_of(method, num_local, indices)
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.rand(index.shape[0], 1, generator=generator, dtype=torch.float64) for index in indices]
    weights = [torch.rand(index.shape, generator=generator, dtype=torch.float64) for index in indices]
    views = [w.reshape(r.weights_shape) for w, r in zip(weights, routes, strict=True)]
    arrived_x = exchange(routes, [r.rows.copies(x) for r, x in zip(routes, tokens, strict=True)])
    arrived_w = exchange(routes, [r.weights.copies(w) for r, w in zip(routes, views, strict=True)])
    arrived_e = exchange(routes, [r.experts_SC for r in routes])

    results = []
    for rank, route in enumerate(routes):
        x_RH = torch.cat([tokens[rank][: route.stay], arrived_x[rank]])
        w_RC = torch.cat([views[rank][: route.stay], arrived_w[rank]])
        e_RC = torch.cat([route.stay_TC, arrived_e[rank]])
        assignment = assign(e_RC, num_local, route.pairs)
        assert assignment.pair_N.numel() == int((e_RC < num_local).sum()) == int(assignment.counts_L.sum())
        expert_N = rank * num_local + torch.arange(num_local).repeat_interleave(assignment.counts_L)
        y_NH = x_RH[assignment.row_N] * expert_N.unsqueeze(1) * assignment.spread(w_RC).unsqueeze(1)
        results.append(assignment.combine(y_NH))
    returned = exchange(routes, [y[r.stay :] for r, y in zip(routes, results, strict=True)], back=True)
    for rank, route in enumerate(routes):
        total = route.rows.total(torch.cat([returned[rank], torch.zeros(1, 1, dtype=torch.float64)]))
        if route.stay:
            total = total + results[rank][: route.stay]
        want = tokens[rank] * (indices[rank] * weights[rank]).sum(1, keepdim=True)
        torch.testing.assert_close(total, want)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(METHODS), routings())
def test_copies_and_totals_are_each_others_adjoint(method, routing):
    num_local, indices = routing
    generator = torch.Generator().manual_seed(1)
    for route, index in zip(routes_of(method, num_local, indices), indices, strict=True):
        for fan, rows in ((route.rows, index.shape[0]), (route.weights, route.weights.slot_QP.shape[0])):
            x = torch.randn(rows, 2, generator=generator, dtype=torch.float64)
            y = torch.randn(sum(route.sent), 2, generator=generator, dtype=torch.float64)
            padded = torch.cat([y, torch.zeros(1, 2, dtype=torch.float64)])
            torch.testing.assert_close((fan.copies(x) * y).sum(), (x * fan.total(padded)).sum())


@settings(max_examples=40, deadline=None)
@given(routings())
def test_one_copy_goes_to_each_remote_rank_that_holds_any_of_a_tokens_experts(routing):
    num_local, indices = routing
    for rank, route in enumerate(routes_of("deduplicated", num_local, indices)):
        owners = [set((row // num_local).tolist()) - {rank} for row in indices[rank]]
        assert list(route.sent) == [sum(r in own for own in owners) for r in range(len(indices))]
        targets = [r for r, rows in enumerate(route.sent) for _ in range(rows)]
        pairs = set(zip(route.rows.source_S.tolist(), targets, strict=True))
        assert pairs == {(token, r) for token, own in enumerate(owners) for r in own}
        assert route.received[rank] == 0


def test_expert_numbers_travel_in_the_narrowest_type_that_also_holds_none():
    assert narrow_type(32767) == torch.int16
    assert narrow_type(32768) == torch.int32


def test_auto_deduplicates_if_a_token_has_several_experts_and_says_why():
    assert choose_dispatch("auto", 8, 2).name == "deduplicated"
    assert "8 experts" in choose_dispatch("auto", 8, 2).reason
    assert choose_dispatch("auto", 1, 2).name == "all_to_all"
    assert choose_dispatch("all_to_all", 8, 2).name == "all_to_all"
    assert choose_dispatch("auto", 8, 1).name == "local"


def test_a_models_experts_are_told_how_to_exchange_tokens(tiny_model):
    blocks = convert(tiny_model(), Layout(2, 2), 0)
    assert set_exchange(blocks, 2).name == "deduplicated"
    assert {block.experts.dispatch for block in blocks} == {"deduplicated"}
    assert set_exchange(convert(tiny_model()), 2).name == "local"


def test_overlap_with_a_shared_expert_is_refused_where_there_is_none(tiny_model):
    with pytest.raises(FamilyError, match=r"Qwen3Moe.*no shared expert.*`shared_expert_gate`.*remove parallel.overlap"):
        shared_expert_of(find_moe_blocks(tiny_model())[0])


def test_a_router_put_in_place_later_is_asked_also_when_the_shared_expert_overlaps():
    config = AutoConfig.for_model(
        "qwen2_moe", vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        moe_intermediate_size=4, shared_expert_intermediate_size=4, num_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    (block,) = convert(AutoModelForCausalLM.from_config(config), Layout(2, 2), 0)
    set_exchange([block], 1, overlap="shared")

    class Refuses(torch.nn.Module):
        def forward(self, x_TH):
            raise LookupError("asked")

    block.module.gate = Refuses()
    with pytest.raises(LookupError, match="asked"):
        block.module(torch.zeros(1, 2, 8))


@pytest.fixture
def alone():
    """A gloo group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


class Noted:
    """What is done, a letter each, in order."""

    def __init__(self, monkeypatch):
        self.done, self._monkeypatch = [], monkeypatch

    def watch(self, owner, name, letter):
        self._monkeypatch.setattr(owner, name, self.noting(letter, getattr(owner, name)))

    def noting(self, letter, work):
        def noted(*args, **kwargs):
            self.done.append(letter)
            return work(*args, **kwargs)

        return noted

    def taken(self):
        letters, self.done[:] = "".join(self.done), []
        return letters


def test_other_work_is_done_while_tokens_travel_forward_and_backward(alone, monkeypatch):
    """``>`` begins an exchange, ``<`` waits for those begun, ``m`` is other work, ``e`` the experts, ``E`` backward."""
    noted = Noted(monkeypatch)
    noted.watch(exchange_module, "all_to_all", ">")
    noted.watch(Flight, "land", "<")

    def mix(x_RH, weights_RC, assignment):
        y_RH = x_RH * weights_RC.sum(1, keepdim=True)
        y_RH.register_hook(lambda d: noted.done.append("E"))
        noted.done.append("e")
        return y_RH

    x = torch.randn(5, 3, requires_grad=True)
    routed = Routed(x, torch.zeros(5, 1, dtype=torch.long), torch.rand(5, 1, requires_grad=True))
    out = mix_everywhere(AllToAll(1, alone), mix, routed, lambda: noted.done.append("m"))
    # Tokens, weights and expert numbers go there, one result comes back; then its gradient, and those of the first two.
    assert noted.taken() == ">>>m<e><"
    out.sum().backward()
    assert noted.taken() == "><E>><"
    torch.testing.assert_close(x.grad, routed.weights_TK.detach().expand(5, 3))


@pytest.mark.parametrize(("last", "order"), [(0, "r>um<>d<"), (40, "ur>m<>d<"), (3, "ur>um<>d<")])
def test_own_tokens_are_computed_while_guests_travel(alone, last, order, monkeypatch):
    """As above; ``r`` reads the counts, ``u`` and ``d`` are own tokens' projections, ``x`` gathers rows for the
    backward pass, ``w`` is the product of the last weight gradient. No guests come, but every exchange takes place.

    Tokens go with their weights and numbers in one exchange. Own tokens' product is queued before the host waits for
    counts, for as many pairs as the last call had; if it had none, or fewer, it comes after guests are sent.
    """
    noted = Noted(monkeypatch)
    noted.watch(exchange_module.Headcount, "read", "r")
    noted.watch(exchange_module, "all_to_all", ">")
    noted.watch(Going, "landed", "<")
    noted.watch(batched, "spread_into", "x")
    noted.watch(batched, "weight_gradient", "w")
    how = types.SimpleNamespace(
        queues_early=lambda x: True, backward_parts=batched.backward_parts,
        up=noted.noting("u", batched.up), down=noted.noting("d", batched.down),
    )  # fmt: skip
    experts, x, weights, index = Case(hidden=16, inner=8, dtype=torch.float32).build("minimal")
    stack = Stack(experts.gate_up_proj, experts.down_proj, None, None, experts.form)
    want = experts(x, index, weights)
    traffic = Traffic(alone, rank=0, ranks=1, pairs=last)
    out = mix_with_guests(how, stack, x, index, weights, traffic, lambda: noted.done.append("m"))
    torch.testing.assert_close(out, want)
    assert noted.taken() == order
    assert traffic.pairs >= index.numel()
    out.sum().backward()
    # Own and others' x and own gradients are gathered before the wait; after the down projection's gradient those of
    # tokens and weights return while the up projection's is computed.
    assert noted.taken() == ">xxx<xw>>w<<"


def launch(folder, ranks, ep, **variables):
    out = folder / f"{ranks}-{ep}.json"
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--max-restarts=0"]
    command = [sys.executable, *torchrun, str(HERE / "dispatch_worker.py"), str(out), str(ep)]
    environment = {**worker_environment(ranks), "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(command, env=environment, timeout=120, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(out.read_text())


@pytest.fixture(
    scope="module",
    params=[(2, 2), pytest.param((4, 2), marks=pytest.mark.slow), pytest.param((4, 4), marks=pytest.mark.slow)],
    ids=["2 ranks", "4 ranks, ep 2", "4 ranks, ep 4"],
)
def report(request, tmp_path_factory):
    world, ep = request.param
    if world == 2:
        folder = request.getfixturevalue("two_ranks")
    else:
        folder = tmp_path_factory.mktemp("dispatch")
        run_ranks(dispatch_worker.report, folder, ep, folder / "dispatch.json", world=world)
    return json.loads((folder / "dispatch.json").read_text())


def test_outputs_and_all_gradients_equal_one_process(report):
    wrong = {f"{case}: {name}": e for case, found in report["cases"].items() for name, e in found["errors"].items()}
    assert len(wrong) > 200
    assert not {name: error for name, error in wrong.items() if not error <= 1e-6}


def test_repeating_it_gives_the_same_bits_also_without_gradients(report):
    assert [case for case, found in report["cases"].items() if not found["same"]] == []


def test_the_host_reads_once_in_a_layer(report):
    assert len(report["reads"]) == 3
    for case, ranks in report["reads"].items():
        assert all(reads == ["tolist"] for reads in ranks), f"{case}: {ranks}"


def test_no_stream_reads_what_another_may_not_have_written(report):
    found = report["too early"]
    assert all(found.pop("not joined"))  # so it would be seen
    assert {how: ranks for how, ranks in found.items() if any(ranks)} == {}


@pytest.mark.parametrize("how", ["as last time", "much less than last time"])
def test_what_is_queued_before_counts_are_known_keeps_little_more_for_backward(report, how):
    for late, early in report["kept"][how]:
        assert late <= early < late * 9 / 8


def test_between_two_ranks_rows_leave_before_they_are_counted_and_the_rest_after(report):
    """``>`` begins an exchange, ``r`` reads the counts; the last exchange returns results."""
    if report["order"]:
        assert report["order"] == {"nothing": ["r>>"] * 2, "enough": [">r>"] * 2, "too few": [">r>>"] * 2}


def test_models_with_shared_experts_equal_one_process_whatever_is_overlapped(report):
    """Every gradient of the model; with the shared expert overlapped, also the loss's very bits."""
    assert set(report["families"]) == {"qwen2_moe", "deepseek_v2", "deepseek_v3"}
    for family, found in report["families"].items():
        assert not {name: error for name, error in found["errors"].items() if not error <= 1e-6}, family
        assert found["same"], family


@pytest.mark.slow
@pytest.mark.skipif(not has_triton() or torch.cuda.is_available(), reason="interprets Triton's kernels on a CPU")
def test_what_runs_on_gpus_equals_one_process_as_interpreted(tmp_path):
    report = launch(tmp_path, 2, 2, TRITON_INTERPRET="1")
    assert len(report["cases"]) == 5
    for case, found in report["cases"].items():
        assert not {name: error for name, error in found["errors"].items() if not error <= 1e-6}, case
        assert found["same"], case


def test_each_layer_remembers_its_own_traffic(alone):
    assert traffic_of(alone, 0) is traffic_of(alone, 0)
    assert traffic_of(alone, 0) is not traffic_of(alone, 1)
