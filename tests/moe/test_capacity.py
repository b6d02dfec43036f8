"""Dropping by capacity, random second choices and experts that choose, against a search choice by choice."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.capacity import capacity, expert_choice, random_second, within_capacity


def seeded(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(0, 12),
    top_k=st.integers(1, 3),
    limit=st.integers(1, 6),
    by=st.sampled_from(["position", "probability"]),
    padded=st.booleans(),
)
@settings(max_examples=120, deadline=None)
def test_capacity_keeps_what_a_queue_at_each_expert_keeps(seed, tokens, top_k, limit, by, padded):
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(5, generator=generator)[:top_k] for _ in range(tokens)]) if tokens else None
    index = index if tokens else torch.empty(0, top_k, dtype=torch.long)
    weights = torch.randint(0, 4, index.shape, generator=generator) / 4  # with ties
    wanted = torch.rand(index.shape, generator=generator) > 0.3 if padded else torch.ones_like(index, dtype=torch.bool)
    queue = [(t, k) for k in range(top_k) for t in range(tokens) if wanted[t, k]]
    if by == "probability":
        queue.sort(key=lambda tk: -float(weights[tk]))
    room, want = [limit] * 5, torch.zeros_like(wanted)
    for t, k in queue:
        if room[int(index[t, k])] > 0:
            room[int(index[t, k])] -= 1
            want[t, k] = True
    got = within_capacity(index, weights, 5, limit, by, wanted if padded else None)
    assert torch.equal(got, want)


def test_capacity_is_the_balanced_share_times_the_factor():
    assert capacity(16, 8, 2, 1.0) == 4
    assert capacity(16, 8, 2, 1.3) == 6
    assert capacity(1, 8, 1, 0.5) == 1


def test_a_second_choice_is_made_with_twice_its_share_as_probability():
    torch.manual_seed(0)
    weights = torch.tensor([[0.8, 0.2]]).repeat(20000, 1)
    made = random_second(weights)
    assert made[:, 0].all()
    assert abs(float(made[:, 1].float().mean()) - 0.4) < 0.02
    assert random_second(torch.tensor([[0.5, 0.5]]).repeat(1000, 1)).all()


@given(seed=st.integers(0, 10**6), limit=st.integers(1, 9), padded=st.booleans())
@settings(max_examples=40, deadline=None)
def test_experts_choose_their_best_real_tokens(seed, limit, padded):
    scores = seeded(7, 4, seed=seed).softmax(-1)
    valid = torch.tensor([True, False, True, True, True, False, True]) if padded else None
    taken = expert_choice(scores, limit, valid)
    tokens = [t for t in range(7) if valid is None or valid[t]]
    for e in range(4):
        want = sorted(tokens, key=lambda t: -float(scores[t, e]))[:limit]
        assert taken[:, e].nonzero().flatten().tolist() == sorted(want)
