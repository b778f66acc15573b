"""What public code of these methods got wrong, each with a test that fails when it comes back here.

The two about votes and the one about templates have more tests in test_voting.py and test_providers.py.
"""

import math
import random

import pytest
import torch

from megatron_urlvr.algorithms.advantages import grpo
from megatron_urlvr.config.reward import RewardSection
from megatron_urlvr.monitor.audit import audit
from megatron_urlvr.rewards import MissingSignalError, available, build_terms, get_reward
from megatron_urlvr.rewards.judge import TEMPLATE, judge_text
from megatron_urlvr.types import Prompt, Sample

OPTIONS = {
    "length": {"target": 0, "sign": -1, "scale": 1},
    **{name: {"aggregation": "mean"} for name in ("self_certainty", "token_entropy", "trajectory_entropy")},
}


def reward(name):
    cls = get_reward(name)
    return cls(cls.Options(**OPTIONS.get(name, {})))


@pytest.mark.parametrize("name", sorted(set(available()) - {"random", "length"}))
def test_no_reward_takes_zeros_for_a_signal_that_is_not_there(name, make_group):
    """Token entropies that another estimator's code path had dropped were read as zeros: advantage 0, every step."""
    group = make_group("q", lengths=[2, 3])
    with pytest.raises(MissingSignalError, match="q"):
        reward(name).score(group)


def test_label_accuracy_is_taken_prompt_by_prompt_whatever_the_order_of_the_batch(make_group):
    """Rows that were reordered to balance lengths were cut into groups again by position."""
    rng = random.Random(1)
    groups, rewards, truths = [], [], []
    for g in range(12):
        n = rng.randint(2, 6)
        truth = torch.tensor([rng.random() < 0.5 for _ in range(n)])
        groups.append(make_group(f"q{g}", classes=[rng.randrange(n) for _ in range(n)], lengths=[1] * n))
        rewards.append(torch.tensor([rng.random() for _ in range(n)]))
        truths.append(truth)
    straight = audit(groups, rewards, truths)
    best = [bool(truth[int(r.argmax())]) for r, truth in zip(rewards, truths, strict=True)]
    assert straight["audit/top_sample_accuracy"] == pytest.approx(sum(best) / len(best))
    order = list(range(12))
    rng.shuffle(order)
    shuffled = audit([groups[i] for i in order], [rewards[i] for i in order], [truths[i] for i in order])
    assert shuffled == pytest.approx(straight)


def test_every_response_is_scored_over_its_own_length(make_group):
    """The reward of a whole group was written at the last member's length."""
    rows = [[-1.0] * 2, [-1.0] * 7, [-1.0] * 3]
    group = make_group(logp=rows)
    cls = get_reward("trajectory_entropy")
    assert cls(cls.Options(aggregation="sum")).score(group).tolist() == [-2, -7, -3]
    backwards = make_group(logp=rows[::-1])
    assert cls(cls.Options(aggregation="sum")).score(backwards).tolist() == [-3, -7, -2]


@pytest.mark.parametrize(
    "name", ["majority_vote", "srt_vote", "scrl_vote", "semantic_entropy", "gated_vote", "anti_majority", "format"]
)
def test_a_group_without_a_parsable_answer_is_scored_like_any_other(name, make_group):
    """The most common answer of no answers was asked for: a crash."""
    group = make_group("q", classes=[None] * 4, entropy=[[1.0]] * 4)
    group.signals["check"] = torch.zeros(4)
    scores = reward(name).score(group)
    assert scores.tolist() == [float(scores[0])] * 4
    assert scores.isfinite().all()


def test_answers_keep_their_places_when_some_cannot_be_parsed(make_group):
    """Unparsable answers were dropped from the list, and all that followed moved up."""
    assert reward("majority_vote").score(make_group(classes=[None, 1, None, 1, 4])).tolist() == [0, 1, 0, 1, 0]


def test_the_probability_of_a_long_response_does_not_vanish(make_group):
    """A product of a thousand probabilities is zero in float32: no advantage, or all of it for the shortest."""
    group = make_group(logp=[[math.log(0.9)] * n for n in (1000, 1001, 1010)])
    section = RewardSection(terms={"main": {"name": "probability"}})
    scores = build_terms(section, advantage="grpo", seed=0).score(group).total
    assert scores.tolist() == pytest.approx([1.0, 0.9, 0.9**10], rel=1e-3)
    assert float(grpo(scores[None])[0, 1]) > float(grpo(scores[None])[0, 2])


def test_a_judge_sees_single_braces():
    """Braces were doubled for a formatter that then did not format: the judge read and wrote boxes of boxes."""
    text = judge_text(TEMPLATE, Prompt("p", "q", (1,)), Sample("p", 0, [1], r"\boxed{1}", "stop"))
    assert "{{" not in text
    assert "}}" not in text
