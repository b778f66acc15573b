"""The audit against counting by hand, and the traps it is there for."""

import math
import random

import pytest
import torch

from megatron_urlvr.config.reward import RewardSection
from megatron_urlvr.monitor.audit import audit, audit_sums, merge, rates, rollout_metrics, rollout_sums, term_sums
from megatron_urlvr.rewards import build_terms
from megatron_urlvr.types import Group, Prompt, Sample, TokenStats


def make(prompt, classes, lengths=None, finish="stop", logp=None, entropy=None):
    samples = []
    for i in range(len(classes)):
        length = lengths[i] if lengths else 1
        stats = TokenStats(entropy=torch.tensor(entropy[i])) if entropy else None
        own = torch.tensor(logp[i]) if logp else None
        samples.append(Sample(prompt, i, [1] * length, "", finish, logp=own, stats=stats))
    return Group(Prompt(prompt, prompt, (1,)), samples, list(classes))


def truth(*values):
    return torch.tensor(values, dtype=torch.bool)


def proxy(*values):
    return torch.tensor(values, dtype=torch.float64)


class TestVoteAgainstTruth:
    def test_each_share_is_counted_by_hand(self):
        # vote: class 0 (three members). Right: class 0's first two by the truth of its grader, and the fifth.
        group = make("p", [0, 0, 0, 3, 4, None])
        metrics = audit([group], [proxy(6, 5, 4, 3, 2, 1)], [truth(1, 1, 0, 0, 1, 0)])
        assert metrics["audit/vote/reward_accuracy"] == pytest.approx(4 / 6)
        assert metrics["audit/vote/precision"] == pytest.approx(2 / 3)
        assert metrics["audit/vote/recall"] == pytest.approx(2 / 3)
        assert metrics["audit/vote/label_accuracy"] == pytest.approx(2 / 3)
        assert metrics["audit/accuracy"] == pytest.approx(3 / 6)
        assert metrics["audit/top_sample_accuracy"] == 1.0
        # right 6, 5, 2 against wrong 4, 3, 1: 3 + 3 + 1 of 9 pairs in order
        assert metrics["audit/auroc"] == pytest.approx(7 / 9)
        assert metrics["audit/auroc_left_out"] == 0

    def test_a_collapse_to_unparsable_text_looks_perfect_and_precision_shows_it(self):
        healthy = [make(str(i), [0, 0, 0, 3]) for i in range(4)]
        right = [truth(1, 1, 1, 0)] * 4
        before = audit(healthy, [proxy(1, 1, 1, 0)] * 4, right)
        assert before["audit/vote/precision"] == 1.0

        collapsed = [make(str(i), [None] * 4) for i in range(4)]
        after = audit(collapsed, [proxy(-0.1, -0.1, -0.1, -0.1)] * 4, [truth(0, 0, 0, 0)] * 4)
        assert after["audit/vote/reward_accuracy"] == 1.0
        assert after["audit/vote/precision"] == 0.0
        assert after["audit/vote/recall"] == 0.0
        assert after["audit/vote/label_accuracy"] == 0.0
        assert after["audit/accuracy"] == 0.0

    def test_reward_accuracy_is_high_while_wrong_answers_scatter(self):
        # one right answer of eight, all different: the vote rewards sample 0, wrongly, and is right on six of eight
        metrics = audit([make("p", list(range(8)))], [proxy(*range(8))], [truth(0, 1, 0, 0, 0, 0, 0, 0)])
        assert metrics["audit/vote/reward_accuracy"] == pytest.approx(6 / 8)
        assert metrics["audit/accuracy"] == pytest.approx(1 / 8)

    def test_a_tied_vote_is_right_by_the_share_of_right_winners(self):
        group = make("p", [0, 1, 1, 0, 4])
        metrics = audit([group], [proxy(0, 0, 0, 0, 0)], [truth(0, 1, 1, 0, 0)])
        assert metrics["audit/vote/label_accuracy"] == 0.5
        assert metrics["audit/vote/precision"] == 0.0  # the rewarded class is the lower one

    def test_shares_are_over_samples_not_means_of_shares(self):
        groups = [make("a", [0, 0, 0, 0]), make("b", [0, None, None, None])]
        metrics = audit(groups, [proxy(0, 0, 0, 0)] * 2, [truth(0, 0, 0, 0), truth(1, 0, 0, 0)])
        assert metrics["audit/vote/precision"] == pytest.approx(1 / 5)


class TestProxyAgainstTruth:
    def test_the_top_sample_is_fractional_among_equals(self):
        metrics = audit([make("p", [0, 1, 2])], [proxy(2, 2, 1)], [truth(1, 0, 0)])
        assert metrics["audit/top_sample_accuracy"] == 0.5

    def test_auroc_is_within_prompts(self):
        # across prompts the proxy ranks perfectly; within each it is upside down
        groups = [make("easy", [0, 1]), make("hard", [0, 1])]
        metrics = audit(groups, [proxy(10, 11), proxy(1, 2)], [truth(1, 0), truth(1, 0)])
        assert metrics["audit/auroc"] == 0.0

    def test_groups_without_a_pair_are_left_out_and_counted(self):
        groups = [make(p, [0, 1]) for p in "abc"]
        right = [truth(1, 1), truth(0, 0), truth(1, 0)]
        metrics = audit(groups, [proxy(1, 0)] * 3, right)
        assert metrics["audit/auroc"] == 1.0
        assert metrics["audit/auroc_left_out"] == pytest.approx(2 / 3)
        assert "audit/auroc" not in audit(groups[:2], [proxy(1, 0)] * 2, right[:2])

    def test_a_judges_yes_and_no_are_counted_apart_over_all_groups(self):
        groups = [make("p", [0, 1, 2, 3]), make("q", [0, 1, 2, 3])]
        judged = [([1.0, 0.5, 1.0, 0.0], [0.0, 0.5, 0.0, 0.0]), ([0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0])]
        for group, (yes, none) in zip(groups, judged, strict=True):
            group.signals |= {"judge": torch.tensor(yes), "judge_unparsable": torch.tensor(none)}
        metrics = audit(groups, [proxy(0, 0, 0, 0)] * 2, [truth(1, 1, 0, 0), truth(0, 0, 0, 0)])
        assert metrics["audit/judge/yes_if_right"] == (1 + 0.5) / 2
        assert metrics["audit/judge/no_if_wrong"] == (0 + 1 + 0 + 1 + 1 + 1) / 6
        assert metrics["audit/judge/balanced_accuracy"] == pytest.approx((1.5 / 2 + 4 / 6) / 2)

    def test_without_a_judge_or_without_right_answers_there_is_no_balanced_accuracy(self):
        assert not any("judge" in name for name in audit([make("p", [0])], [proxy(1)], [truth(1)]))
        group = make("p", [0, 1])
        group.signals |= {"judge": torch.ones(2), "judge_unparsable": torch.zeros(2)}
        metrics = audit([group], [proxy(1, 1)], [truth(0, 0)])
        assert metrics["audit/judge/no_if_wrong"] == 0.0
        assert not {"audit/judge/yes_if_right", "audit/judge/balanced_accuracy"} & metrics.keys()

    def test_prompts_without_a_label_are_left_out_and_counted(self):
        groups = [make("a", [0, 0]), make("b", [0, 1])]
        metrics = audit(groups, [proxy(1, 1), proxy(1, 0)], [None, truth(1, 0)])
        alone = audit(groups[1:], [proxy(1, 0)], [truth(1, 0)])
        assert metrics["audit/no_label"] == 0.5
        assert {**metrics, "audit/no_label": 0.0} == alone
        assert audit(groups[:1], [proxy(1, 1)], [None]) == {"audit/no_label": 1.0}


def random_batch(seed, prompts):
    rng = random.Random(seed)
    groups, rewards, right = [], [], []
    for p in prompts:
        answers = [rng.choice([None, "1", "2", "3"]) for _ in range(6)]
        groups.append(
            make(p, [None if a is None else answers.index(a) for a in answers], lengths=[rng.randint(1, 9)] * 6)
        )
        rewards.append(proxy(*(rng.choice([0.0, 0.5, rng.random()]) for _ in answers)))
        right.append(truth(*(a == "1" for a in answers)))
    return groups, rewards, right


class TestGrouping:
    def test_neither_order_nor_a_prompt_that_comes_twice_mixes_anything(self):
        groups, rewards, right = random_batch(0, ["a", "b", "a", "c", "b", "a"])
        metrics = audit(groups, rewards, right)
        label_free = rollout_metrics(groups, rewards)
        each = [audit([g], [r], [c]) for g, r, c in zip(groups, rewards, right, strict=True)]
        for name in ("audit/top_sample_accuracy", "audit/vote/label_accuracy", "audit/accuracy"):
            assert metrics[name] == pytest.approx(sum(m[name] for m in each) / len(each))

        order = list(range(6))
        random.Random(1).shuffle(order)
        shuffled = [[part[i] for i in order] for part in (groups, rewards, right)]
        assert audit(*shuffled) == pytest.approx(metrics)
        assert rollout_metrics(*shuffled[:2]) == pytest.approx(label_free)

    def test_sums_of_processes_add_up_to_the_whole_batch(self):
        groups, rewards, right = random_batch(3, [str(i) for i in range(9)])
        cuts = [slice(0, 1), slice(1, 1), slice(1, 9)]  # one process has nothing
        audits = [audit_sums(groups[c], rewards[c], right[c]) for c in cuts]
        assert rates(merge(audits)) == pytest.approx(audit(groups, rewards, right))
        rollouts = [rollout_sums(groups[c], rewards[c]) for c in cuts]
        assert rates(merge(rollouts)) == pytest.approx(rollout_metrics(groups, rewards))

    def test_rewards_of_another_group_are_refused(self):
        group = make("q8", [0, 1])
        with pytest.raises(ValueError, match=r"q8.*2 samples.*rewards.*\(3,\)"):
            audit([group], [proxy(1, 2, 3)], [truth(1, 0)])
        with pytest.raises(ValueError, match=r"q8.*truths"):
            audit([group], [proxy(1, 2)], [truth(1)])
        group.classes = []
        with pytest.raises(ValueError, match=r"q8.*0 graded answers"):
            rollout_metrics([group], [proxy(1, 2)])


class TestRolloutMetrics:
    def test_they_are_counted_by_hand(self):
        groups = [
            make("a", [0, 0, 2, None], lengths=[2, 4, 6, 8]),
            make("b", [None, None, None, None], lengths=[16, 16, 16, 16], finish="length"),
        ]
        metrics = rollout_metrics(groups, [proxy(1, 1, 0, 0), proxy(0, 0, 0, 0)])
        assert metrics["reward/proxy"] == pytest.approx(2 / 8)
        assert metrics["reward/proxy_std"] == pytest.approx(math.sqrt(1 / 3) / 2)
        assert metrics["reward/zero_variance"] == 0.5
        assert metrics["vote/majority_ratio"] == pytest.approx((2 / 4 + 0) / 2)
        assert metrics["vote/no_answer_groups"] == 0.5
        assert metrics["vote/ties"] == 0.0
        assert metrics["answers/unique"] == pytest.approx((2 + 0) / 2)
        assert metrics["response/length"] == pytest.approx((20 + 64) / 8)
        assert metrics["response/truncated"] == 0.5
        assert metrics["response/no_answer"] == pytest.approx(5 / 8)
        assert "policy/entropy" not in metrics
        assert "policy/sampled_entropy" not in metrics

    def test_entropies_are_means_over_tokens(self):
        group = make("a", [0, 1], lengths=[1, 3], entropy=[[2.0], [0.0, 1.0, 0.5]], logp=[[-4.0], [-1.0, -1.0, 0.0]])
        metrics = rollout_metrics([group], [proxy(0, 1)])
        assert metrics["policy/entropy"] == pytest.approx(3.5 / 4)
        assert metrics["policy/sampled_entropy"] == pytest.approx(6 / 4)

    def test_terms_report_their_raw_mean_and_what_they_counted(self):
        section = RewardSection(terms={"vote": {"name": "majority_vote", "weight": 3}, "fmt": {"name": "format"}})
        combined = build_terms(section, advantage="grpo", seed=0)
        groups = [make("a", [0, 0, 2, None]), make("b", [None, None]), make("c", [0, 1, 1, 0])]
        metrics = rates(term_sums(groups, combined.score_groups(groups)))
        assert metrics["term/vote"] == pytest.approx((2 + 0 + 2) / 10)
        assert metrics["term/fmt"] == pytest.approx((3 + 0 + 4) / 10)
        assert metrics["term/vote/no_answer_groups"] == pytest.approx(1 / 3)
        assert metrics["term/vote/ties"] == pytest.approx(1 / 3)
        assert metrics["term/vote/zero_variance"] == pytest.approx(1 / 3)
        assert metrics["term/fmt/zero_variance"] == pytest.approx(2 / 3)
