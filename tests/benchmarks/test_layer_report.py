"""Ratios of layer benchmarks are of the fastest arms, the right way up."""

from benchmarks.layer_report import ratios, table


def row(seconds, saved, peak=None):
    error = {"out": 0.0, "dx": 0.0, "dw": 0.0}
    return {"s": seconds, "saved_bytes": saved, "peak_bytes": peak, "times_s": [seconds], "exact": True, "error": error}


ROWS = {
    "transformers eager": row(8.0, 50),
    "transformers grouped_mm": row(4.0, 40, 20),
    "ours grouped_mm": row(3.0, 40, 20),
    "ours minimal": row(2.0, 10, 12),
    "ScatterMoE": row(3.0, 30, 15),
}


def test_our_fastest_arm_is_compared():
    assert ratios(ROWS) == {
        "speed over transformers eager": 4.0,
        "speed over transformers grouped_mm": 2.0,
        "speed over ScatterMoE": 1.5,
        "speed over transformers' best": 2.0,
        "saved_bytes over transformers grouped_mm": 0.25,
        "peak_bytes over transformers grouped_mm": 0.6,
    }
    assert ratios({"transformers eager": row(1.0, 1)}) == {}


def test_the_table_has_every_arm_and_what_was_left_out():
    layer = {"ceiling_flops": 1e12, "balanced": ROWS, "skewed": {}, "skipped": {"DeepSpeed": "absent"}}
    printed = table("a layer", layer, 10**12)
    assert all(name in printed for name in ROWS)
    assert "50.0%" in printed, "ours minimal takes twice what the ceiling allows"
    assert "left out: DeepSpeed: absent" in printed
