"""Bandwidths are measured at once, and are bytes over seconds."""

from __future__ import annotations

import time

import pytest

from checkpointing.bandwidth import measure


@pytest.mark.parametrize("threads", [1, 2])
def test_host_rates_are_plausible(threads: int) -> None:
    began = time.perf_counter()
    rates = measure(hash_threads=threads, nbytes=4 << 20)
    assert time.perf_counter() - began < 10
    # Any machine that runs the tests copies and hashes between 10 MB/s and 10 TB/s.
    assert 1e7 < rates.host_copy < 1e13
    assert 1e7 < rates.hash < 1e13
    assert rates.device_to_host is None
    assert rates.capture == rates.host_copy
    assert rates.disk is None


def test_the_device_is_timed_by_its_own_function() -> None:
    asked: list[int] = []

    def copy_seconds(nbytes: int) -> float:
        asked.append(nbytes)
        return (0.5, 2.0, 1.0)[len(asked) - 1]

    rates = measure(nbytes=1 << 20, device_to_host=copy_seconds)
    assert asked == [1 << 20] * 3
    assert rates.device_to_host == 1 << 20, "the median second"
    assert rates.capture == rates.device_to_host
