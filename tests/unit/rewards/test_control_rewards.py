"""Ground truth and the controls."""

import math
import random

import pytest
import torch

from megatron_urlvr.loop.signals import permuted
from megatron_urlvr.rewards import MissingSignalError, get_reward


def make(name, seed=0, **options):
    cls = get_reward(name)
    return cls(cls.Options(**options), seed=seed)


def test_ground_truth_pays_what_is_right_and_says_that_it_is_supervised(make_group):
    assert make("ground_truth").score(make_group(correct=[1, 0, 1])).tolist() == [1, 0, 1]
    assert get_reward("ground_truth").supervised
    assert get_reward("ground_truth").needs == {"label"}


@pytest.mark.parametrize("name", ["ground_truth", "incorrect"])
def test_a_prompt_without_a_label_is_an_error(name, make_group):
    group = make_group("q2", classes=[0, 1])
    with pytest.raises(MissingSignalError, match=f"{name}.*correct.*q2"):
        make(name).score(group)
    group.signals["correct"] = torch.tensor([1.0, math.nan])
    with pytest.raises(MissingSignalError, match=f"{name}.*correct.*q2"):
        make(name).score(group)


def test_random_is_the_same_whatever_stands_beside_the_sample(make_group):
    whole = make_group("a", lengths=[1] * 16)
    part = make_group("a", lengths=[1] * 16)
    part.samples = [part.samples[i] for i in (9, 3, 12)]
    scores = make("random", seed=5).score(whole).tolist()
    assert make("random", seed=5).score(part).tolist() == [scores[9], scores[3], scores[12]]


def test_random_depends_on_seed_prompt_index_and_version(make_group):
    def draw(seed, prompt, version=0):
        group = make_group(prompt, lengths=[1] * 32)
        for sample in group.samples:
            sample.version = version
        return tuple(make("random", seed=seed).score(group).tolist())

    assert draw(0, "a") == draw(0, "a")
    assert len({draw(0, "a"), draw(1, "a"), draw(0, "b"), draw(1, "b"), draw(0, "a", 1), draw(0, "a", 2)}) == 6
    assert len(set(draw(0, "a"))) == 2


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 1.0])
def test_random_pays_with_probability_p(p, make_group):
    scores = torch.cat([make("random", p=p).score(make_group(str(g), lengths=[1] * 50)) for g in range(100)])
    assert abs(scores.mean().item() - p) <= 4 * math.sqrt(p * (1 - p) / 5000)


def test_random_knows_nothing_of_the_response(make_group):
    group, other = make_group("a", classes=[0, 1, 2]), make_group("a", classes=[None, 1, 1], lengths=[5, 6, 7])
    assert torch.equal(make("random").score(group), make("random").score(other))


def test_format_pays_any_answer(make_group):
    assert make("format").score(make_group(classes=[0, None, 2])).tolist() == [1, 0, 1]


def test_length_is_the_scaled_distance_from_the_target(make_group):
    group = make_group(lengths=[2, 5, 9])
    assert make("length", target=0, sign=1, scale=1).score(group).tolist() == [2, 5, 9]
    assert make("length", target=5, sign=-1, scale=2).score(group).tolist() == [-1.5, 0, -2]


@pytest.mark.parametrize("absent", ["target", "sign", "scale"])
def test_length_assumes_nothing(absent):
    options = {"target": 0, "sign": -1, "scale": 1}
    del options[absent]
    with pytest.raises(ValueError, match=absent):
        make("length", **options)


def test_incorrect_pays_the_most_frequent_wrong_answer(make_group):
    group = make_group(classes=[0, 1, 1, 3, 0, 0, None], correct=[1, 0, 0, 0, 1, 1, 0])
    assert make("incorrect").score(group).tolist() == [0, 1, 1, 0, 0, 0, 0]
    assert make("incorrect", wrong="any").score(group).tolist() == [0, 1, 1, 1, 0, 0, 0]
    assert get_reward("incorrect").supervised


@pytest.mark.parametrize("wrong", ["majority", "any"])
def test_incorrect_pays_nothing_where_all_are_right_or_unparsable(wrong, make_group):
    group = make_group(classes=[0, 0, None], correct=[1, 1, 0])
    assert make("incorrect", wrong=wrong).score(group).tolist() == [0, 0, 0]


def test_flipped_truth_pays_as_many_right_and_wrong_ones_as_the_vote(make_group):
    rng = random.Random(5)
    moved = 0
    for g in range(200):
        n = rng.randint(2, 10)
        answers = [rng.choice([None, 0, 1, 2]) for _ in range(n)]
        classes = [None if a is None else answers.index(a) for a in answers]
        right = [float(a == 0) for a in answers]
        group = make_group(str(g), classes=classes, correct=right)
        paid = get_reward("majority_vote")().score(group).tolist()
        flipped = make("flipped_truth", seed=g).score(group).tolist()
        for truth in (1.0, 0.0):
            assert sum(p for p, r in zip(paid, right, strict=True) if r == truth) == sum(
                f for f, r in zip(flipped, right, strict=True) if r == truth
            )
        moved += paid != flipped
        assert make("flipped_truth", seed=g).score(group).tolist() == flipped
    assert moved > 50


def test_flipped_truth_by_rates_has_those_rates(make_group):
    reward = make("flipped_truth", match="rates", recall=0.8, false_positive=0.1)
    groups = [make_group(str(g), classes=[0] * 50, correct=[1.0] * 25 + [0.0] * 25) for g in range(80)]
    scores = torch.stack([reward.score(group) for group in groups])
    assert abs(scores[:, :25].mean().item() - 0.8) < 4 * math.sqrt(0.16 / 2000)
    assert abs(scores[:, 25:].mean().item() - 0.1) < 4 * math.sqrt(0.09 / 2000)


@pytest.mark.parametrize(
    ("options", "sentence"), [({"match": "rates"}, "needs recall"), ({"recall": 0.5}, "match: rates alone")]
)
def test_flipped_truth_wants_rates_where_it_reads_them(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        make("flipped_truth", **options)


def test_labels_change_hands_in_one_circle():
    ids = [f"train/{i}" for i in range(100)]
    other = permuted(ids, 3)
    assert sorted(other) == sorted(other.values()) == sorted(ids)
    assert all(own != given for own, given in other.items())
    assert permuted(ids[::-1], 3) == other
    assert permuted(ids, 4) != other
    place, seen = ids[0], set()
    while place not in seen:
        seen.add(place)
        place = other[place]
    assert len(seen) == 100


def test_permuted_truth_is_its_signal_and_says_that_it_is_supervised(make_group):
    group = make_group("q", classes=[0, 1])
    with pytest.raises(MissingSignalError, match=r"permuted_truth.*permuted_label.*'q'"):
        make("permuted_truth").score(group)
    group.signals["permuted_label"] = torch.tensor([0.0, 1.0])
    assert make("permuted_truth").score(group).tolist() == [0, 1]
    assert get_reward("permuted_truth").supervised
