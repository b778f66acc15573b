"""Rewards that look at a part of the response: which tokens they take, and what they give where there are none."""

import pytest
import torch

from megatron_urlvr.config.reward import RewardSection
from megatron_urlvr.rewards import MissingSignalError, get_reward


def make(name, **options):
    cls = get_reward(name)
    return cls(cls.Options(**options))


def located(group, places):
    group.signals["answer_start"] = torch.tensor([float(first) for first, _ in places])
    group.signals["answer_end"] = torch.tensor([float(last) for _, last in places])
    return group


VALUES = [[0.1, 0.2, 0.4, 0.8, 1.6], [0.3, 0.5], [1.0, 2.0, 4.0]]
PLACES = [(2, 4), (-1, -1), (0, 3)]
"""An answer in the middle, none, and a response that is nothing but its answer."""


@pytest.mark.parametrize(
    ("span", "kept"),
    [
        ("reasoning", [[0.1, 0.2], [0.3, 0.5], []]),
        ("answer", [[0.4, 0.8], [], [1.0, 2.0, 4.0]]),
        ("not_answer", [[0.1, 0.2, 1.6], [0.3, 0.5], []]),
    ],
)
@pytest.mark.parametrize("aggregation", ["mean", "sum"])
def test_a_span_takes_its_own_tokens_and_an_empty_one_its_own_value(span, kept, aggregation, make_group):
    group = located(make_group(entropy=VALUES), PLACES)
    reward = make("token_entropy", aggregation=aggregation, span=span, empty=-9.0)
    scores = reward.score(group)
    expected = [-9.0 if not own else -sum(own) / (len(own) if aggregation == "mean" else 1) for own in kept]
    assert scores.tolist() == pytest.approx(expected, rel=1e-6)
    (counts,) = reward.counts([group], [scores])
    assert counts["empty_span"] == pytest.approx(sum(not own for own in kept) / 3)


def test_a_span_needs_the_answers_places_and_a_value_for_nothing():
    assert make("token_entropy", aggregation="sum").needs == {"entropy"}
    narrow = make("token_entropy", aggregation="sum", span="answer", empty=0.0)
    assert narrow.needs == {"entropy", "answer_start", "answer_end"}
    for wrong, sentence in (({"span": "answer"}, "needs empty"), ({"empty": 0.0}, "narrower span alone")):
        with pytest.raises(ValueError, match=sentence):
            RewardSection(terms={"main": {"name": "token_entropy", "aggregation": "mean", **wrong}})


def test_places_that_are_not_there_or_outside_are_errors(make_group):
    reward = make("trajectory_entropy", aggregation="sum", span="answer", empty=0.0)
    with pytest.raises(MissingSignalError, match=r"answer_start.*'q'"):
        reward.score(make_group("q", logp=[[-1.0]]))
    with pytest.raises(MissingSignalError, match="tokens 1 to 3 of 2"):
        reward.score(located(make_group("q", logp=[[-1.0, -1.0]]), [(1, 3)]))


def test_disparity_is_the_mean_gap_of_the_answers_tokens(make_group):
    generator = torch.Generator().manual_seed(1)
    logits = [torch.randn(t, 11, generator=generator, dtype=torch.float64) * 2 for t in (6, 3)]
    gaps = []
    for z in logits:
        first, second = z.softmax(-1).topk(2).values.unbind(-1)
        gaps.append((first - second).tolist())
    group = located(make_group(top2_gap=gaps), [(1, 5), (-1, -1)])
    reward = make("probability_disparity", no_answer=0.25)
    scores = reward.score(group)
    assert scores.tolist() == pytest.approx([sum(gaps[0][1:5]) / 4, 0.25], abs=1e-6)
    assert reward.counts([group], [scores]) == [{"no_answer": 0.5}]


def test_rent_is_the_mean_entropy_and_a_low_value_for_what_cannot_be_parsed(make_group):
    group = make_group(classes=[0, None, 0], entropy=[[1.0, 2.0], [0.1, 0.1], [0.0]])
    reward = make("rent")
    scores = reward.score(group)
    assert scores.tolist() == pytest.approx([-1.5, -7.0, 0.0])
    assert reward.counts([group], [scores]) == [{"malformed": pytest.approx(1 / 3)}]
    assert make("rent", malformed=-2.0).score(group).tolist()[1] == -2.0
