from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.policies import LRU

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("touch"), st.integers(0, 6), st.just(frozenset())),
        st.tuples(st.just("evict"), st.just(0), st.frozensets(st.integers(0, 6), max_size=5)),
    ),
    max_size=60,
)


@given(STEPS)
def test_lru_evicts_the_unpinned_key_with_the_oldest_touch(steps):
    lru, last_touch = LRU(), {}
    for now, (what, key, pinned) in enumerate(steps):
        if what == "touch":
            lru.touch(key)
            last_touch[key] = now
            continue
        candidates = [k for k in last_touch if k not in pinned]
        if not candidates:
            with pytest.raises(LookupError):
                lru.victim(pinned)
            continue
        expected = min(candidates, key=last_touch.__getitem__)
        assert lru.victim(pinned) == expected
        lru.forget(expected)
        del last_touch[expected]


def test_policies_do_not_import_torch():
    code = "import sys, inference.policies; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
