"""What public code of these methods got wrong, each with a test that fails when it comes back here.

The two about votes and the one about templates have more tests in test_voting.py and test_providers.py.
"""

import math
import random
from types import SimpleNamespace

import pytest
import torch
from replicas import Replicas, Wire

from megatron_urlvr.algorithms.advantages import grpo
from megatron_urlvr.config.reward import RewardSection
from megatron_urlvr.monitor.audit import audit, audit_sums, merge, rates
from megatron_urlvr.policy import spread
from megatron_urlvr.policy.balance import RowCost
from megatron_urlvr.policy.batch import Row
from megatron_urlvr.rewards import MissingSignalError, available, build_terms, get_reward
from megatron_urlvr.rewards.judge import TEMPLATE, judge_text
from megatron_urlvr.types import STATISTICS, Prompt, Sample, TokenStats, samples_of

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


def test_rows_that_other_replicas_computed_are_scored_and_audited_in_their_own_group(make_group, monkeypatch):
    """The same defect where rows really move: long ones go to the other replica to be computed, and the statistics,
    which say whose they are, come home before rewards and metrics. Cut into groups where they were computed, they
    would not be these."""
    monkeypatch.setattr(spread, "dist", Wire())
    monkeypatch.setattr(spread, "gather_json", lambda value, group: group(value))
    rng = random.Random(3)
    lengths = [[rng.randint(1, 9) * (6 if g % 2 else 1) for _ in range(4)] for g in range(6)]
    logp = [[[-rng.random() for _ in range(length)] for length in own] for own in lengths]
    truth = [torch.tensor([rng.random() < 0.5 for _ in range(4)]) for _ in range(6)]
    rewarded = reward("trajectory_entropy")

    def step(rank, total, gather):
        """Replica 0 owns the even groups, of short responses, and replica 1 the odd ones."""
        mine = range(rank, 6, 2)
        groups = [make_group(f"q{g}", classes=[0] * 4, lengths=lengths[g]) for g in mine]
        rows = [Row((g,), [100 * g + 10 * k] * len(own)) for g in mine for k, own in enumerate(logp[g])]
        layout = SimpleNamespace(dp=2, dp_rank=rank, peers=gather)
        passed = spread.Spread(rows, layout, RowCost(token=100, head=10, pair=1), share_prefix=False)
        computed = [torch.tensor([logp[row.response[0] // 100][row.response[0] % 100 // 10]]) for row in passed.rows]
        home = iter(passed.returned(computed, 1))
        for sample in samples_of(groups):
            sample.stats = TokenStats(logp=next(home)[0])
        scores = rewarded.score_groups(groups)
        return passed.metrics["balance/moved"], scores, audit_sums(groups, scores, [truth[g] for g in mine])

    one, other = Replicas(2).run(step)
    assert one[0] == other[0] > 0.1
    expected = [torch.tensor([math.fsum(own) / len(own) for own in rows]) for rows in logp]
    found = [score for pair in zip(one[1], other[1], strict=True) for score in pair]
    for own, score in zip(expected, found, strict=True):
        assert score.tolist() == pytest.approx(own.tolist(), rel=1e-6)
    best = [bool(right[int(own.argmax())]) for own, right in zip(expected, truth, strict=True)]
    metrics = rates(merge([one[2], other[2]]))
    assert metrics["audit/top_sample_accuracy"] == pytest.approx(sum(best) / 6)


def test_every_response_is_scored_over_its_own_length(make_group):
    """The reward of a whole group was written at the last member's length."""
    rows = [[-1.0] * 2, [-1.0] * 7, [-1.0] * 3]
    group = make_group(logp=rows)
    cls = get_reward("trajectory_entropy")
    assert cls(cls.Options(aggregation="sum")).score(group).tolist() == [-2, -7, -3]
    backwards = make_group(logp=rows[::-1])
    assert cls(cls.Options(aggregation="sum")).score(backwards).tolist() == [-3, -7, -2]


NOTHING_FOUND = {
    "answer_start": -1.0, "answer_end": -1.0, "check": 0.0, "check_stopped": 0.0, "judge": 0.0, "judge_unparsable": 1.0,
    "cross_vote": 0.0, "cross_vote_none": 1.0, "correct": 0.0, "permuted_label": 0.0,
}  # fmt: skip
"""Signals of a response in which nothing was found, and that nothing confirms."""


@pytest.mark.parametrize("name", available())
def test_a_group_without_a_parsable_answer_is_scored_like_any_other(name, make_group):
    """The most common answer of no answers was asked for: a crash."""
    alike = {statistic: [[-0.5, -0.25]] * 4 for statistic in STATISTICS}
    group = make_group("q", classes=[None] * 4, **alike)
    group.signals = {signal: torch.full((4,), value) for signal, value in NOTHING_FOUND.items()}
    scores = reward(name).score(group)
    assert scores.isfinite().all()
    if name != "random":
        assert scores.tolist() == [float(scores[0])] * 4
    for count, value in reward(name).counts([group], [scores])[0].items():
        assert value == -0.75 if count == "log" else 0 <= value <= 1
    if get_reward(name).needs & {"answer", "cross_vote", "check", "judge"} and name not in UNPAID:
        assert float(scores[0]) == 0


UNPAID = {"rent": -7.0, "scrl_vote": -1.0}
"""What these pay a response without an answer, when it is not nothing."""


@pytest.mark.parametrize("name", sorted(UNPAID))
def test_where_no_answer_has_a_price_it_is_that(name, make_group):
    group = make_group("q", classes=[None] * 4, entropy=[[1.0]] * 4)
    assert reward(name).score(group).tolist() == [UNPAID[name]] * 4


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
