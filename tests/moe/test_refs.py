"""Names and layouts: every expert has one name and the right owners."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.layout import Layout
from moe.refs import ExpertRef, TensorAddress


@given(st.integers(0, 500), st.integers(0, 5000))
def test_expert_refs_survive_printing(layer, expert):
    assert ExpertRef.parse(str(ExpertRef(layer, expert))) == ExpertRef(layer, expert)


def test_a_bad_expert_ref_is_refused():
    with pytest.raises(ValueError, match=r"L03\.E017"):
        ExpertRef.parse("L3E17")


@given(st.integers(1, 6), st.integers(0, 4), st.integers(1, 6), st.integers(1, 7))
def test_units_tile_a_stacked_tensor(num_local, ep_rank, rows, cols):
    address = TensorAddress("x", (num_local, rows, cols), 2, "down_proj", ep_rank * num_local, 5 * num_local)
    spans = address.units()
    assert [s.start for s in spans] == [i * rows * cols for i in range(num_local)]
    assert spans[-1].stop == num_local * rows * cols
    assert spans[0].unit == f"L02.E{ep_rank * num_local:03d}.down_proj"
    assert address.global_shape == (5 * num_local, rows, cols)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_every_expert_has_one_owner_per_replica(ep, edp, per_rank):
    layout = Layout(world=ep * edp, ep=ep)
    for expert in range(ep * per_rank):
        assert len(layout.owners(expert, ep * per_rank)) == edp


@pytest.mark.parametrize(("world", "ep"), [(4, 3), (2, 4), (0, 1)])
def test_a_layout_that_does_not_fit_is_refused(world, ep):
    with pytest.raises(ValueError, match="must divide"):
        Layout(world, ep)


def test_experts_that_do_not_split_evenly_are_refused():
    with pytest.raises(ValueError, match="does not divide 9 experts"):
        Layout(2, 2).local_experts(0, 9)
