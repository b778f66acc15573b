"""Properties that hold for every input, searched by hypothesis."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    assert_grad_close,
    assert_stats_close,
    make_case,
    oracle,
    small_tiles,
    weighted_sum,
)
from urlvr_kernels import DIFFERENTIABLE, OUTPUTS, lm_head_stats, logits_stats, reference
from urlvr_kernels.rowstate import COUNT, FIELDS, MAX, Wanted, merge, statistics
from urlvr_kernels.torch_ops import TorchOps

EVERYTHING = Wanted(True, True, True, True, True)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 20),
    width=st.integers(1, 9),
    vocab=st.integers(2, 400),
    padding=st.integers(0, 5),
    tile_rows=st.integers(1, 7),
    elements=st.integers(1024, 3000),
    stash=st.sampled_from([0, 2000, 1 << 20]),
    one_pass=st.booleans(),
    outputs=st.sampled_from([OUTPUTS, DIFFERENTIABLE]),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_no_tiling_temperature_padding_or_row_choice_changes_the_answer(
    rows, width, vocab, padding, tile_rows, elements, stash, one_pass, outputs, seed, data
):
    case = make_case(rows, width, vocab + padding, seed=seed)
    case.target %= vocab
    ignored = data.draw(st.lists(st.integers(0, rows - 1), max_size=rows))
    case.target[ignored] = -100
    tau = torch.rand(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.3
    used = tuple(data.draw(st.lists(st.sampled_from(DIFFERENTIABLE), min_size=1, unique=True)))
    expected = oracle(case, outputs, used, temperature=tau, vocab_size=vocab)
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    with small_tiles(elements, tile_rows):
        stats = lm_head_stats(
            hidden,
            weight,
            case.target,
            temperature=tau,
            vocab_size=vocab,
            outputs=outputs,
            stash_bytes=stash,
            workspace_bytes=elements * 4,
            upstream={name: case.grads[name] for name in used} if one_pass else None,
        )
        (stats.loss if one_pass else weighted_sum(stats, case.grads, used)).backward()
    assert_stats_close(stats, expected[0], outputs, 1e-10)
    assert_grad_close(hidden.grad, expected[1], 1e-9, "hidden")
    assert_grad_close(weight.grad, expected[2], 1e-9, "weight")


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=40),
    cuts=st.sets(st.integers(1, 38), max_size=4),
    order=st.randoms(use_true_random=False),
)
def test_states_of_any_partition_merge_to_the_same_statistics_in_any_order(logits, cuts, order):
    z = torch.tensor([logits], dtype=torch.float64)
    vocab = z.shape[1]
    target = torch.tensor([order.randrange(vocab)])
    borders = [0, *sorted(c for c in cuts if c < vocab), vocab]
    parts = []
    for begin, end in pairwise(borders):
        state = torch.empty(FIELDS, 1, dtype=torch.float64)
        state[COUNT] = end - begin
        TorchOps().row_state(z[:, begin:end], state, EVERYTHING, target=target, first=begin, inv_tau=None)
        parts.append(state)
    order.shuffle(parts)
    while len(parts) > 1:  # a random tree of merges
        a, b = parts.pop(order.randrange(len(parts))), parts.pop(order.randrange(len(parts)))
        parts.append(merge(torch.stack([a, b]), EVERYTHING))
    found = statistics(parts[0], OUTPUTS, vocab)[2]
    expected = reference.logits_stats(z, target, outputs=OUTPUTS)
    assert parts[0][MAX].item() == z.max().item()
    for name in OUTPUTS:
        if name == "argmax":
            assert found[name].item() == z[0].tolist().index(z.max().item())
        else:
            assert torch.allclose(found[name], getattr(expected, name), rtol=1e-10, atol=1e-10), name


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), vocab=st.integers(2, 300), scale=st.floats(0.0, 30.0))
def test_statistics_stay_in_their_ranges(seed, vocab, scale):
    logits = scale * torch.randn(6, vocab, generator=torch.Generator().manual_seed(seed))
    stats = logits_stats(logits, torch.arange(6) % vocab, outputs=OUTPUTS)
    slack = 1e-5 * (1 + scale)
    log_v = torch.tensor(float(vocab)).log()
    assert (stats.logp <= slack).all()
    assert ((stats.entropy >= -slack) & (stats.entropy <= log_v + slack)).all()
    assert (stats.self_certainty >= -slack).all()
    assert ((stats.max_prob >= 1 / vocab - slack) & (stats.max_prob <= 1 + slack)).all()
    assert ((stats.top2_gap >= 0) & (stats.top2_gap <= stats.max_prob + slack)).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), shift=st.floats(-500, 500))
def test_adding_a_constant_to_all_logits_changes_only_the_log_sum_exp(seed, shift):
    logits = 3 * torch.randn(4, 60, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    target = torch.arange(4)
    plain, moved = (logits_stats(x, target, outputs=OUTPUTS) for x in (logits, logits + shift))
    for name in set(OUTPUTS) - {"lse", "argmax"}:
        assert torch.allclose(getattr(plain, name), getattr(moved, name), rtol=1e-9, atol=1e-9), name
    assert torch.allclose(plain.lse + shift, moved.lse, rtol=1e-12)
