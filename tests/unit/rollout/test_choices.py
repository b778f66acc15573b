"""Dynamic sampling and the choice of trained votes: reasons are counted, quotas filled, shares kept."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_urlvr.config.rollout import RolloutSection
from megatron_urlvr.rollout.choice import choose
from megatron_urlvr.rollout.filters import Band, Majority, Verdict, ZeroVariance, available, get_filter, select
from megatron_urlvr.types import Group, Prompt, Sample


def group(classes: list[int | None]) -> Group:
    samples = [Sample("p", k, [1], "", "stop") for k in range(len(classes))]
    return Group(Prompt("p", "", (1,)), samples, classes)


def test_a_group_of_equal_rewards_teaches_nothing_and_is_dropped() -> None:
    keep = ZeroVariance()
    assert keep.judge(group([0, 0]), torch.tensor([1.0, 1.0])) == (False, "zero_variance")
    assert keep.judge(group([0, 1]), torch.tensor([1.0, 0.0])) == (True, "varied")


@pytest.mark.parametrize(
    ("classes", "verdict"),
    [
        ([0, 0, 2, 3], Verdict(True, "in_band")),
        ([0, 1, 2, 3], Verdict(False, "minority")),
        ([0, 0, 0, 0], Verdict(False, "unanimous")),
        ([None, None, None, None], Verdict(False, "no_answer")),
        ([None, None, None, 3], Verdict(False, "minority")),
    ],
)
def test_a_majority_must_lie_in_the_band(classes: list[int | None], verdict: Verdict) -> None:
    assert Majority(Band(low=0.5, high=0.9)).judge(group(classes), torch.zeros(4)) == verdict


@given(st.lists(st.sampled_from([[0, 0], [0, 1], [None, None]]), min_size=1, max_size=12), st.integers(1, 12))
def test_every_step_has_its_quota_and_every_group_is_counted_once(found: list[list[int | None]], quota: int) -> None:
    quota = min(quota, len(found))
    groups = [group(classes) for classes in found]
    rewards = [torch.tensor([1.0, float(classes[1] == classes[0])]) for classes in found]
    kept, counts = select(ZeroVariance(), groups, rewards, quota)
    good = [place for place, classes in enumerate(found) if classes == [0, 1]]
    assert len(kept) == quota
    assert kept == sorted(set(kept))
    assert set(good[:quota]) <= set(kept)
    assert counts["kept"] + counts["spare"] == len(good)
    assert counts["filled"] == max(0, quota - len(good))
    assert counts["kept"] + counts["spare"] + counts.get("dropped/zero_variance", 0) == len(found)


def test_an_unknown_filter_is_named_with_those_there_are() -> None:
    assert available() == ["majority", "zero_variance"]
    with pytest.raises(ValueError, match="there is no filter 'zero_varience'; known: majority, zero_variance"):
        get_filter("zero_varience")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"oversample": 2.0}, "without a filter"),
        ({"filter": {"name": "zero_variance"}}, "nothing to choose from"),
        ({"filter": {"name": "majority", "low": 0.9, "high": 0.1}, "oversample": 2.0}, "no group lies between"),
        ({"train_on": "random"}, "all votes are trained on"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        RolloutSection.model_validate({"prompts": 4, "n_votes": 8, "max_new_tokens": 4} | settings)
    fine = {"filter": {"name": "majority", "low": 0.3}, "oversample": 1.4, "train_on": "stratified", "n_train": 2}
    section = RolloutSection.model_validate({"prompts": 4, "n_votes": 8, "max_new_tokens": 4} | fine)
    assert section.sampled == 6
    assert section.filter is not None
    assert section.filter.options == {"low": 0.3, "high": 1.0}


CLASSES = st.lists(st.sampled_from([None, 0, 1, 2]), min_size=1, max_size=40)


@given(CLASSES, st.floats(0, 1), st.integers(0, 5))
def test_stratified_votes_have_the_shares_of_all_votes(classes: list[int | None], part: float, seed: int) -> None:
    count = int(part * len(classes))
    places = choose(classes, count, "stratified", seed)
    assert places == sorted(set(places))
    assert len(places) == count
    taken, all_votes = Counter(classes[k] for k in places), Counter(classes)
    for answer, number in all_votes.items():
        assert abs(taken[answer] - count * number / len(classes)) < 1, "rounded, no more"


def test_choices_differ_by_seed_and_repeat_by_it() -> None:
    classes: list[int | None] = [0] * 20
    for how in ("random", "stratified"):
        assert choose(classes, 5, how, 1) == choose(classes, 5, how, 1)
        assert len({tuple(choose(classes, 5, how, seed)) for seed in range(20)}) > 10
    assert choose(classes, 3, "first", 9) == [0, 1, 2]
    with pytest.raises(ValueError, match="21 of 20 votes"):
        choose(classes, 21, "first", 0)
