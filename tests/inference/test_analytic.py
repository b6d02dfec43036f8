"""Times of a shape without a trace, and charts."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from inference.analytic import ShapeError, answer, decode_with_prefetch, parse_shape
from inference.chart import Panel, svg
from inference.costmodel import ExpertCosts, named_profile
from trainer.cli import main

SHAPE = "layers=24,experts=64,top_k=8,hidden=2048,intermediate=1024"
H200 = named_profile("h200")
SIZES = parse_shape(SHAPE)
LINK_ONLY = ExpertCosts.of(H200, 2048, 1024, 2, 0)


def decode(dense_s, misses, accuracy, costs=LINK_ONLY):
    return decode_with_prefetch(costs, SIZES, dense_s, misses, 8 - misses, accuracy)


def test_without_prefetch_a_token_waits_for_every_miss():
    found = decode(1e-3, 4, 0.0)
    assert found.ahead == 0
    assert found.seconds == pytest.approx(24 * (1e-3 + 4 * LINK_ONLY.link_s), rel=0.03)


def test_with_an_oracle_and_an_idle_link_nothing_is_waited_for():
    found = decode(5e-3, 4, 1.0)
    assert found.seconds == pytest.approx(24 * 5e-3, rel=0.02)
    assert found.ahead == pytest.approx(4)


def test_a_busy_link_bounds_what_prefetching_gains():
    found = decode(1e-5, 4, 1.0)
    assert found.seconds >= 24 * 4 * LINK_ONLY.link_s * 0.999
    assert found.bound == "link"


def test_prefetching_never_costs_and_gains_with_accuracy():
    costs = ExpertCosts.of(H200, 2048, 1024, 2, 16)
    for dense_s in (1e-5, 3e-4, 3e-3):
        times = [decode(dense_s, 5.3, accuracy, costs).seconds for accuracy in (0.0, 0.3, 0.6, 0.9, 1.0)]
        assert times == sorted(times, reverse=True)


def test_all_resident_nothing_is_fetched():
    found = answer(H200, SIZES, 1.0, 0.9)
    assert found.plain.link_s == found.ahead.link_s == 0
    assert found.plain.seconds == found.ahead.seconds
    assert [one.plan.mode for one in found.prompts] == ["resident", "resident"]


def test_more_resident_is_faster_and_prompts_stream():
    times = [answer(H200, SIZES, share, 0.0) for share in (0.1, 0.5, 0.9)]
    assert [one.plain.seconds for one in times] == sorted((one.plain.seconds for one in times), reverse=True)
    assert all(one.prompts[1].plan.mode == "stream" for one in times)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("layers=24", "experts is missing"),
        (SHAPE + ",colour=red", "'colour=red' is none of"),
        (SHAPE.replace("=64", "=0"), "not a whole number above 0"),
        (SHAPE.replace("top_k=8", "top_k=80"), "top_k=80 of 64"),
        (SHAPE + ",dtype=int4", "dtype=int4 is none of"),
        (SHAPE + ",dense=lots", "is not a size"),
    ],
)
def test_shapes_that_are_none_are_refused(text, said):
    with pytest.raises(ValueError, match=said):
        parse_shape(text)


def test_a_shape_must_agree_with_the_trace():
    assert parse_shape("hidden=8,intermediate=4", {"layers": 2, "experts": 4, "top_k": 1}).total_experts == 8
    with pytest.raises(ShapeError, match="the trace has 2"):
        parse_shape(SHAPE, {"layers": 2})


def test_the_command_answers(capsys):
    assert main(["simulate", "--shape", SHAPE, "--capacity", "0.1", "--prefetch-accuracy", "0.9"]) == 0
    said = capsys.readouterr().out
    assert "decode, prefetch 90% right" in said
    assert "prefill of 4096 tokens" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give a TRACE"),
        (["--shape", SHAPE], "--capacity"),
        (["--shape", SHAPE, "--capacity", "2"], "out of range"),
        (["--shape", SHAPE, "--capacity", "0.1", "--profile", "abacus"], "no profile 'abacus'"),
        (["trace", "--capacity", "0.1"], "without a TRACE"),
        (["--shape", SHAPE, "--capacity", "0.1", "--budgets", "0.5"], "--budgets needs a TRACE"),
        (["--shape", SHAPE, "--capacity", "0.1", "--sequence", "0"], "--sequence needs a TRACE"),
        (["--shape", SHAPE, "--capacity", "0.1", "--tokens", "9"], "--tokens needs a TRACE"),
        (["--shape", f"{SHAPE},layers=5", "--capacity", "0.1"], "layers is given twice"),
        (["trace", "--prefetch-accuracy", "0"], "without a TRACE"),
        (["trace", "--profile", "h200"], "times need both"),
        (["trace", "--cpu-experts"], "on a clock only"),
        (["trace", "--no-pack"], "on a clock only"),
        (["trace", "--plot", "x.png"], "ends in .svg"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments, said, capsys):
    assert main(["simulate", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_chart_has_every_line_in_its_panel_and_names_are_escaped():
    panels = [Panel("a", "x", {"p<q": [(0, 1), (2, 3)], "r": [(0, 2)]}), Panel("b", "x", {"r": [(1, 1), (2, 2)]})]
    tree = ElementTree.fromstring(svg(panels))
    space = "{http://www.w3.org/2000/svg}"
    assert len(tree.findall(f"{space}polyline")) == 3
    assert {"p<q", "r"} <= {text.text for text in tree.findall(f"{space}text")}
    first = tree.findall(f"{space}polyline")[0].get("points").split()
    low, high = (tuple(map(float, point.split(","))) for point in first)
    assert low[0] < high[0]
    assert low[1] > high[1]  # upwards is a smaller y
