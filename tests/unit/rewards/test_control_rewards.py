"""Ground truth and the controls."""

import math

import pytest
import torch

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


def test_random_depends_on_seed_prompt_and_index(make_group):
    def draw(seed, prompt):
        return tuple(make("random", seed=seed).score(make_group(prompt, lengths=[1] * 32)).tolist())

    assert draw(0, "a") == draw(0, "a")
    assert len({draw(0, "a"), draw(1, "a"), draw(0, "b"), draw(1, "b")}) == 4
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
