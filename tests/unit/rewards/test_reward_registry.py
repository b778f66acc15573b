"""What is registered, what is said about it, and rewards of other packages."""

import re
from importlib.metadata import EntryPoint
from math import inf
from pathlib import Path

import pytest
import torch

from megatron_urlvr import registry
from megatron_urlvr.config.base import UnknownName
from megatron_urlvr.rewards import Range, Reward, available, describe, get_reward, register

ALL = {
    "self_certainty", "token_entropy", "trajectory_entropy", "probability", "majority_vote",
    "ground_truth", "random", "format", "length", "incorrect", "anti_majority", "flipped_truth", "permuted_truth",
    "rent", "probability_disparity", "srt_vote", "scrl_vote", "semantic_entropy", "gated_vote", "co_rewarding",
    "program", "self_verification",
}  # fmt: skip


class FromElsewhere(Reward):
    name = "from_elsewhere"
    needs = frozenset()
    formula = "1"
    value_range = Range(1, 1)
    source = "a test"

    def score(self, group):
        return torch.ones(len(group))


def install(monkeypatch, *points):
    found = [EntryPoint(name=name, value=value, group="megatron_urlvr.reward") for name, value in points]
    monkeypatch.setattr(registry, "entry_points", lambda group: [p for p in found if p.group == group])


def test_every_reward_says_what_it_is():
    entries = {entry.name: entry for entry in describe()}
    assert set(entries) >= ALL
    for entry in entries.values():
        assert entry.formula
        assert entry.value_range
        assert entry.source
    supervised = {name for name in ALL if entries[name].supervised}
    assert supervised == {"ground_truth", "incorrect", "flipped_truth", "permuted_truth"}
    aggregation = entries["trajectory_entropy"].options[0]
    assert aggregation.name == "aggregation"
    assert aggregation.default is None
    assert "repetition" in aggregation.doc
    (p,) = entries["random"].options
    assert (p.type, p.default) == ("float", "0.5")


def test_a_range_is_two_numbers_and_says_so(monkeypatch):
    assert [str(each) for each in (Range(0, 1), Range(0, inf), Range(-inf, 0), Range(0, 1, "{0, 1}"))] == [
        "[0, 1]", "[0, inf)", "(-inf, 0]", "{0, 1}",
    ]  # fmt: skip
    semantic = get_reward("semantic_entropy")
    assert semantic().value_range.is_unit
    assert str(semantic(semantic.Options(no_meaning=-0.5)).value_range) == "[-0.5, 1]"
    monkeypatch.setattr(FromElsewhere, "value_range", "[0, 1]")
    with pytest.raises(TypeError, match=r"value_range = '\[0, 1\]', which must be a megatron_urlvr.rewards.Range"):
        register(FromElsewhere)


def test_only_supervised_rewards_read_labels():
    for name in available():
        cls = get_reward(name)
        assert cls.supervised == bool({"label", "permuted_label"} & cls.needs)


def test_an_unknown_name_says_what_there_is():
    with pytest.raises(UnknownName) as error:
        get_reward("majority_votes")
    assert "majority_vote" in error.value.known


def test_an_entry_point_adds_a_reward(monkeypatch):
    install(monkeypatch, ("from_elsewhere", f"{__name__}:FromElsewhere"))
    assert "from_elsewhere" in available()
    assert get_reward("from_elsewhere") is FromElsewhere


def test_an_entry_point_does_not_take_over_a_name_of_the_programs_own(monkeypatch):
    install(monkeypatch, ("majority_vote", f"{__name__}:FromElsewhere"))
    assert get_reward("majority_vote") is not FromElsewhere


def test_two_packages_with_the_same_name_are_an_error(monkeypatch):
    install(monkeypatch, ("twice", f"{__name__}:FromElsewhere"), ("twice", "another.package:Reward"))
    with pytest.raises(ValueError, match=r"twice.*another\.package:Reward"):
        get_reward("twice")


def test_what_is_no_reward_is_refused(monkeypatch):
    install(monkeypatch, ("not_one", "collections:OrderedDict"))
    with pytest.raises(TypeError, match=r"not_one.*OrderedDict"):
        get_reward("not_one")


def test_a_reward_that_hides_its_use_of_labels_is_refused():
    class Hidden(FromElsewhere):
        name = "hidden"
        needs = frozenset({"label"})

    with pytest.raises(TypeError, match="supervised"):
        register(Hidden)


def test_a_name_can_be_registered_once():
    class Again(FromElsewhere):
        name = "majority_vote"

    with pytest.raises(ValueError, match="majority_vote"):
        register(Again)


def test_the_documentation_lists_every_reward_with_its_needs():
    page = (Path(__file__).parents[3] / "docs" / "rewards.md").read_text()
    rows = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("| `")}
    for entry in describe():
        row = rows[f"`{entry.name}`"]
        assert ("**supervised**" in row) == entry.supervised
        assert {need.strip() for need in row.split("|")[-4].split(",")} - {"–"} == set(entry.needs)


def test_the_example_in_the_documentation_runs(make_group):
    page = (Path(__file__).parents[3] / "docs" / "rewards.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    scope = {"torch": torch, "Reward": Reward, "Range": Range}
    exec(code, scope)
    group = make_group(lengths=[1, 1])
    group.samples[0].text = "YES"
    assert scope["Shouting"]().score(group).tolist() == [1.0, 0.0]
