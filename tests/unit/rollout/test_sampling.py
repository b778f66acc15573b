"""Draws that belong to a sample, and tokens picked by them."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_urlvr.rollout.sampling import pick, sample_seeds, uniforms

STEADY = settings(deadline=None, derandomize=True, database=None)


def table(seed: int, ids: list[str], n: int, positions: int) -> np.ndarray:
    """`[len(ids) * n, positions]` draws."""
    seeds = sample_seeds(seed, ids, n)
    return np.stack([uniforms(seeds, t).numpy() for t in range(positions)], 1)


def p_value(statistic: float, freedom: int) -> float:
    """Upper tail of the chi-square distribution."""
    half = torch.tensor(freedom / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half, torch.tensor(statistic / 2, dtype=torch.float64)))


def fits(counts: torch.Tensor, probabilities: torch.Tensor) -> bool:
    """Pearson's test at one in a thousand, cells expected below 5 pooled."""
    expected = probabilities * counts.sum()
    rare = expected < 5
    seen = torch.cat([counts[~rare], counts[rare].sum()[None]])
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]])
    kept = wanted > 0
    assert not seen[~kept].any()
    return p_value(float(((seen - wanted)[kept] ** 2 / wanted[kept]).sum()), int(kept.sum()) - 1) > 1e-3


# -- draws ------------------------------------------------------------------------------------------------------------


def test_draws_are_uniform():
    draws = table(0, [f"p{i}" for i in range(50)], 16, 64).reshape(-1)
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = torch.from_numpy(np.histogram(draws, bins=64, range=(0, 1))[0]).double()
    assert fits(counts, torch.full((64,), 1 / 64, dtype=torch.float64))


def test_no_two_samples_or_positions_share_a_draw():
    """A sample's seed and its positions are counted in the same steps: were seeds not mixed, sample k at position t
    would draw what sample k + 1 draws at t - 1."""
    draws = table(7, [f"p{i}" for i in range(20)], 8, 32)
    assert len(np.unique(draws)) == draws.size


@pytest.mark.parametrize("shift", [-2, -1, 0, 1, 2])
@pytest.mark.parametrize("neighbour", [1, 2])
def test_neighbouring_samples_are_uncorrelated_at_every_shift_of_position(neighbour: int, shift: int):
    draws = table(1, [f"p{i}" for i in range(200)], 8, 40).reshape(200, 8, 40)
    own, other = draws[:, :-neighbour, 2:-2], draws[:, neighbour:, 2 + shift : 38 + shift]
    correlation = np.corrcoef(own.reshape(-1), other.reshape(-1))[0, 1]
    assert abs(correlation) < 4 / math.sqrt(own.size)


def test_successive_positions_are_uncorrelated_and_so_are_prompts_and_seeds():
    draws = table(1, [f"p{i}" for i in range(100)], 4, 40)
    pairs = {
        "positions": (draws[:, :-1], draws[:, 1:]),
        "prompts": (draws[:-4], draws[4:]),
        "seeds": (draws, table(2, [f"p{i}" for i in range(100)], 4, 40)),
    }
    for what, (a, b) in pairs.items():
        assert abs(np.corrcoef(a.reshape(-1), b.reshape(-1))[0, 1]) < 4 / math.sqrt(a.size), what


def test_a_samples_draws_do_not_depend_on_how_many_there_are_or_who_comes_first():
    few, many = table(3, ["a", "b"], 2, 5), table(3, ["c", "b", "a"], 6, 5)
    assert np.array_equal(few[0:2], many[12:14])
    assert np.array_equal(few[2:4], many[6:8])


def test_draws_are_the_same_on_every_machine():
    """Runs are reproduced from their seed: these numbers may not change."""
    found = table(0, ["train/0"], 2, 2)
    expected = [[splitmix(0, "train/0", k, t) for t in range(2)] for k in range(2)]
    assert found.tolist() == expected


def splitmix(seed: int, prompt: str, index: int, position: int) -> float:
    """The same in Python's integers (Steele et al., OOPSLA 2014, with the published constants)."""
    import hashlib

    def mixed(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    golden = 0x9E3779B97F4A7C15
    base = int.from_bytes(hashlib.blake2b(f"{seed}/{prompt}".encode(), digest_size=8).digest(), "little")
    own = mixed((base + index * golden) % 2**64)
    return (mixed((own + (position + 1) * golden) % 2**64) >> 11) / 2**53


# -- picking ----------------------------------------------------------------------------------------------------------


def inverse(probabilities: list[float], draw: float) -> int:
    """The first token at which the running sum exceeds the draw."""
    total = 0.0
    for token, p in enumerate(probabilities):
        total += p
        if total > draw:
            return token
    raise AssertionError(f"{probabilities} sums to {total}, not above {draw}")


@STEADY
@given(st.lists(st.floats(-8, 8), min_size=1, max_size=12), st.floats(0, 0.999))
def test_a_token_is_where_the_running_sum_of_the_softmax_passes_the_draw(logits: list[float], draw: float):
    z = torch.tensor([logits])
    p = z.double().softmax(-1)[0]
    edges = p.cumsum(0)
    if (edges - draw).abs().min() < 1e-9:
        return
    assert int(pick(z, torch.tensor([draw], dtype=torch.float64))) == inverse((p / p.sum()).tolist(), draw)


@STEADY
@given(st.lists(st.floats(-6, 6), min_size=1, max_size=10, unique=True), st.floats(0.05, 0.99), st.floats(0, 0.999))
def test_top_p_draws_from_the_smallest_set_that_holds_the_mass(logits: list[float], top_p: float, draw: float):
    z = torch.tensor([logits])
    p = z.double().softmax(-1)[0].tolist()
    ranked = sorted(range(len(p)), key=lambda token: -p[token])
    sets = list(itertools.accumulate(p[token] for token in ranked))
    if min(abs(mass - top_p) for mass in sets) < 1e-9:
        return
    size = next(k + 1 for k, mass in enumerate([*sets[:-1], 2.0]) if mass >= top_p)
    kept = ranked[:size]
    inner = [p[token] / sum(p[t] for t in kept) for token in kept]
    if min(abs(edge - draw) for edge in itertools.accumulate(inner)) < 1e-9:
        return
    expected = kept[inverse([*inner, 1e-6], draw)] if draw < sum(inner) else kept[-1]
    assert int(pick(z, torch.tensor([draw], dtype=torch.float64), top_p=top_p)) == expected


def test_a_token_of_probability_zero_is_never_picked_at_either_end_of_the_draws():
    z = torch.tensor([[-math.inf, 0.0, -math.inf, 1.0, -math.inf]])
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    for top_p in (1.0, 0.9):
        assert {int(pick(z, end[None], top_p=top_p)) for end in ends} == {1, 3}
    tiny = torch.full((1, 7), -1000.0)
    tiny[0, 2] = 0.0
    assert [int(pick(tiny, end[None])) for end in ends] == [2, 2]


def test_rows_are_picked_independently():
    z = torch.randn(50, 9, generator=torch.Generator().manual_seed(0))
    draws = torch.rand(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    together = pick(z, draws)
    alone = torch.cat([pick(z[i : i + 1], draws[i : i + 1]) for i in range(50)])
    assert torch.equal(together, alone)
