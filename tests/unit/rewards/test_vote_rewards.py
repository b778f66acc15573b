"""Rewards from votes that abstain, pay dissent, or ask for a confirmation, each against a brute force."""

import math
import random
from collections import Counter

import pytest
import torch

from megatron_urlvr.rewards import MissingSignalError, get_reward


def make(name, **options):
    cls = get_reward(name)
    return cls(cls.Options(**options))


@pytest.fixture
def random_groups(make_group):
    """Groups of answers with entropies, some without any answer."""
    rng = random.Random(7)
    groups = []
    for g in range(200):
        n = rng.randint(1, 12)
        answers = [rng.choice([None, *range(rng.randint(1, 5))]) for _ in range(n)]
        first = {a: answers.index(a) for a in set(answers) - {None}}
        classes = [None if a is None else first[a] for a in answers]
        entropy = [[rng.uniform(0, 2) for _ in range(rng.randint(1, 5))] for _ in range(n)]
        groups.append(make_group(f"q{g}", classes=classes, entropy=entropy))
    return groups


def winner_of(classes):
    counts = Counter(c for c in classes if c is not None)
    return min(counts, key=lambda c: (-counts[c], c)) if counts else None


def test_soft_votes_pay_each_answer_its_share_where_the_winner_is_strong_enough(random_groups):
    for threshold in (0.0, 0.5):
        for soft in (True, False):
            reward = make("srt_vote", soft=soft, threshold=threshold)
            for group in random_groups:
                n, winner = len(group), winner_of(group.classes)
                strong = winner is not None and group.classes.count(winner) / n >= threshold
                expected = [
                    0.0 if c is None or not strong else group.classes.count(c) / n if soft else float(c == winner)
                    for c in group.classes
                ]
                scores = reward.score(group)
                assert scores.tolist() == pytest.approx(expected, abs=1e-9)
                (counts,) = reward.counts([group], [scores])
                assert counts["abstained"] == float(not strong)


def test_selective_votes_follow_the_published_rule(random_groups):
    reward = make("scrl_vote", tau_pos=0.4, tau_marg=0.1, tau_low=0.3)
    kinds = Counter()
    for group in random_groups:
        n, classes = len(group), group.classes
        entropy = [float(sample.stats.entropy.double().mean()) for sample in group.samples]
        share = {c: classes.count(c) / n for c in classes if c is not None}
        ranked = sorted(share.values(), reverse=True)
        votes = [round(each * n) for each in ranked]
        clear = bool(ranked) and 10 * votes[0] >= 4 * n and (len(votes) == 1 or 10 * (votes[0] - votes[1]) > n)
        positive = winner_of(classes) if clear else None
        expected = []
        for c in classes:
            if c is None:
                expected.append(-1.0)
            elif c == positive:
                expected.append(1.0)
            else:
                own = [h for h, other in zip(entropy, classes, strict=True) if other == c]
                uncertain = sum(own) / len(own) >= sum(entropy) / n
                expected.append(-1.0 if share[c] < 0.3 and uncertain else 0.0)
        kinds.update(expected)
        assert reward.score(group).tolist() == expected
    assert {-1.0, 0.0, 1.0} <= kinds.keys()


@pytest.mark.parametrize("n", [20, 40, 60])
def test_a_lead_of_just_the_margin_is_no_clear_majority(make_group, n):
    """With 20 samples 10 votes against 7 lead by .15, and 11 against 7 by more."""
    for first, paid in ((n // 2, 0), (n // 2 + 1, n // 2 + 1)):
        second = n // 2 - 3 * n // 20
        classes = [0] * first + [first] * second + [None] * (n - first - second)
        scores = make("scrl_vote", tau_marg=0.15).score(make_group(classes=classes, entropy=[[1.0]] * n))
        assert int((scores > 0).sum()) == paid


def test_a_rare_answer_is_only_punished_when_it_was_uncertain(make_group):
    group = make_group(classes=[0, 0, 0, 0, 0, 0, 6, 7], entropy=[[1.0]] * 6 + [[2.0], [0.1]])
    scores = make("scrl_vote").score(group)
    assert scores.tolist() == [1, 1, 1, 1, 1, 1, -1, 0]
    (counts,) = make("scrl_vote").counts([group], [scores])
    assert counts == {"abstained": 0.0, "negative": 1 / 8}


class TestGatedVote:
    def group(self, make_group, classes, checks):
        group = make_group("q", classes=classes)
        group.signals["check"] = torch.tensor(checks, dtype=torch.float32)
        return group

    def test_a_confirmed_majority_is_paid_like_a_vote(self, make_group):
        group = self.group(make_group, [0, 0, 2, None], [1, 1, 0, 0])
        scores = make("gated_vote").score(group)
        assert scores.tolist() == [1, 1, 0, 0]
        assert make("gated_vote").counts([group], [scores]) == [{"confirmed": 1.0}]

    def test_an_unconfirmed_majority_is_pushed_down_and_the_residual_sums_to_zero(self, make_group):
        rng = random.Random(3)
        for _ in range(100):
            n = rng.randint(2, 9)
            answers = [rng.choice([None, 0, 1, 2]) for _ in range(n)]
            first = {a: answers.index(a) for a in set(answers) - {None}}
            classes = [None if a is None else first[a] for a in answers]
            scores = make("gated_vote", push_down=0.7).score(self.group(make_group, classes, [0] * n))
            assert float(scores.sum()) == pytest.approx(0, abs=1e-12)
            winner = winner_of(classes)
            if winner is None:
                assert scores.tolist() == [0] * n
                continue
            wins = [c == winner for c in classes]
            a = sum(wins) / n
            rest = [i for i in range(n) if not wins[i]]
            agree = {
                i: sum(classes[j] == classes[i] and classes[i] is not None for j in rest if j != i)
                / max(len(rest) - 1, 1)
                for i in rest
            }
            for i in range(n):
                own = -0.7 * a if wins[i] else a * (agree[i] - sum(agree.values()) / len(rest))
                assert float(scores[i]) == pytest.approx(own + 0.7 * a * a, abs=1e-12)

    def test_a_check_on_another_answer_does_not_confirm_the_majority(self, make_group):
        scores = make("gated_vote").score(self.group(make_group, [0, 0, 2], [0, 0, 1]))
        assert float(scores[0]) < 0 < float(scores[2])

    def test_a_group_without_any_answer_is_no_crash(self, make_group):
        assert make("gated_vote").score(self.group(make_group, [None, None], [0, 0])).tolist() == [0, 0]

    def test_a_check_that_was_not_made_is_an_error(self, make_group):
        with pytest.raises(MissingSignalError, match=r"gated_vote.*'check'.*'q'"):
            make("gated_vote").score(make_group("q", classes=[0, 0]))


def test_dissent_is_paid_by_its_control_alone(make_group):
    group = make_group(classes=[0, 0, 2, None, 4])
    assert make("anti_majority").score(group).tolist() == [0, 0, 1, 0, 1]
    assert make("anti_majority").score(make_group(classes=[None])).tolist() == [0]


class TestSemanticEntropy:
    @staticmethod
    def entropy(classes):
        """Brute force: every unparsable response is a cluster of its own."""
        names = [("none", i) if c is None else c for i, c in enumerate(classes)]
        return -sum(k / len(names) * math.log(k / len(names)) for k in Counter(names).values())

    def test_clusters_are_paid_their_share_where_entropy_is_low_enough(self, random_groups):
        for limit in (1.0, 0.6):
            reward = make("semantic_entropy", max_entropy=limit)
            for group in random_groups:
                n = len(group)
                gated = self.entropy(group.classes) >= limit * math.log(n) - 1e-9
                expected = [0.0 if c is None or gated else group.classes.count(c) / n for c in group.classes]
                scores = reward.score(group)
                assert scores.tolist() == pytest.approx(expected, abs=1e-9)
                (counts,) = reward.counts([group], [scores])
                assert counts["gated"] == float(gated)

    def test_answers_that_all_differ_and_answers_that_are_not_there_pay_nobody(self, make_group):
        assert make("semantic_entropy").score(make_group(classes=[0, 1, 2])).tolist() == [0, 0, 0]
        assert make("semantic_entropy").score(make_group(classes=[None, None])).tolist() == [0, 0]
        assert make("semantic_entropy", no_meaning=-0.5).score(make_group(classes=[0, 0, None])).tolist()[2] == -0.5

    def test_what_means_the_same_can_be_decided_elsewhere(self, make_group):
        group = make_group(classes=[0, 1, 2, 3])
        for sample, text in zip(group.samples, ["Yes it  is", "yes IT is", "no", ""], strict=True):
            sample.text = text
        assert make("semantic_entropy", equivalence="text").score(group).tolist() == [0.5, 0.5, 0.25, 0]
        group.signals["cluster"] = torch.tensor([3.0, 3.0, 3.0, -1.0])
        reward = make("semantic_entropy", equivalence="signal")
        assert reward.needs == {"cluster"}
        assert reward.score(group).tolist() == [0.75, 0.75, 0.75, 0]

    def test_an_unknown_equivalence_says_what_there_is(self):
        with pytest.raises(ValueError, match=r"clustering.*answer, text"):
            make("semantic_entropy", equivalence="same")


@pytest.mark.parametrize("name", ["srt_vote", "scrl_vote", "semantic_entropy", "anti_majority"])
def test_answers_that_were_not_graded_are_an_error(name, make_group):
    with pytest.raises(MissingSignalError, match="'q'"):
        make(name).score(make_group("q", entropy=[[1.0], [1.0]]))
