"""GSPO, CISPO and KL-Cov against their formulas in float64, and over any cut of a mini-batch."""

import math
import random
from itertools import pairwise

import pytest
import torch
from replicas import Replicas
from torch.testing import assert_close

from megatron_urlvr.algorithms.covariance import held_tokens
from megatron_urlvr.algorithms.losses import LossInputs, build_loss, token_weights
from megatron_urlvr.config.algorithm import AlgorithmSection, KLSection
from megatron_urlvr.types import TokenStats


class Batch:
    """Responses of random lengths, as float64 leaves."""

    def __init__(self, seed=0, sequences=7):
        rng = random.Random(seed)
        self.lengths = [rng.randint(1, 9) for _ in range(sequences)]
        self.advantage = [rng.gauss(0, 1) for _ in self.lengths]
        self.logp = [[-rng.random() * 3 for _ in range(n)] for n in self.lengths]
        self.old = [[x + rng.gauss(0, 0.4) for x in row] for row in self.logp]
        self.held = [[float(rng.random() < 0.3) for _ in row] for row in self.logp]

    def leaves(self):
        return [torch.tensor(row, dtype=torch.float64, requires_grad=True) for row in self.logp]

    def cut(self, loss, parts, *, on_policy=False):
        """(summed loss, metrics, gradient in sample order) of the micro-batches `parts`."""
        total, sums, gradients = 0.0, {}, {}
        for part in parts:
            flat = lambda rows: torch.tensor([x for i in part for x in rows[i]])  # noqa: B023, E731
            lengths = torch.tensor([self.lengths[i] for i in part])
            weight = token_weights(
                lengths, loss.aggregation, total_tokens=sum(self.lengths),
                total_sequences=len(self.lengths), max_new_tokens=9,
            )  # fmt: skip
            logp = flat(self.logp).requires_grad_()
            inputs = LossInputs(
                advantage=torch.tensor([self.advantage[i] for i in part]).repeat_interleave(lengths),
                weight=weight,
                old_logp=None if on_policy else flat(self.old),
                lengths=[self.lengths[i] for i in part],
                held=flat(self.held),
            )
            value, metrics = loss(TokenStats(logp=logp), inputs)
            value.backward()
            total += float(value.detach())
            for name, amount in metrics.items():
                sums[name] = sums.get(name, 0.0) + float(amount)
            for i, piece in zip(part, logp.grad.split(lengths.tolist()), strict=True):
                gradients[i] = piece
            if on_policy:
                assert_close(loss.upstream(inputs)["logp"], logp.grad, rtol=1e-5, atol=1e-7)
        return total, loss.finish(sums), torch.cat([gradients[i] for i in range(len(self.lengths))])


def loss_of(**settings):
    return build_loss(AlgorithmSection(loss=settings).loss, KLSection())


def objective(name, batch, leaves, settings):
    """The printed objective, minimised, response after response."""
    total = torch.zeros((), dtype=torch.float64)
    for i, logp in enumerate(leaves):
        old, a, n = torch.tensor(batch.old[i], dtype=torch.float64), batch.advantage[i], len(logp)
        if name == "gspo":
            s = torch.exp((logp - old).mean())
            low, high = 1 - settings["clip_low"], 1 + settings["clip_high"]
            total = total - torch.minimum(s * a, s.clamp(low, high) * a) / len(leaves)
            continue
        ratio = torch.exp(logp - old)
        if name == "cispo":
            clipped = ratio.detach().clamp(1 - settings["clip_low"], 1 + settings["clip_high"])
            each = -clipped * a * logp
        else:
            held = torch.tensor(batch.held[i], dtype=torch.float64)
            each = -ratio * a + settings["coef"] * held * (logp - old).abs()
        total = total + each.sum() / n / len(leaves)
    return total


CASES = [
    {"name": "gspo", "clip_low": 0.1, "clip_high": 0.15},
    {"name": "gspo", "clip_low": 3e-4, "clip_high": 4e-4},
    {"name": "cispo", "clip_low": 1.0, "clip_high": 0.2},
    {"name": "cispo", "clip_low": 0.3, "clip_high": 0.2},
    {"name": "kl_cov", "coef": 0.7, "share": 0.1},
]


@pytest.mark.parametrize("settings", CASES)
def test_value_and_gradient_are_those_of_the_printed_objective(settings):
    batch = Batch(seed=3)
    leaves = batch.leaves()
    expected = objective(settings["name"], batch, leaves, settings)
    expected.backward()
    loss = loss_of(aggregation="sequence_mean", **settings)
    total, metrics, gradient = batch.cut(loss, [list(range(7))])
    assert total == pytest.approx(float(expected.detach()), rel=1e-5)
    assert_close(gradient.double(), torch.cat([leaf.grad for leaf in leaves]), rtol=1e-4, atol=1e-6)
    assert 0 < metrics["policy/clip_fraction"] < 1


@pytest.mark.parametrize("settings", CASES)
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "fixed_length"])
def test_any_cut_into_micro_batches_gives_the_same(settings, aggregation):
    batch, loss = Batch(seed=5), loss_of(aggregation=aggregation, **settings)
    whole = batch.cut(loss, [list(range(7))])
    for parts in ([[3, 0], [6, 5, 4], [1, 2]], [[i] for i in range(7)]):
        cut = batch.cut(loss, parts)
        assert cut[0] == pytest.approx(whole[0], rel=1e-5, abs=1e-7)
        assert_close(cut[2], whole[2], rtol=1e-5, atol=1e-7)
        assert cut[1] == pytest.approx(whole[1], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("settings", CASES)
def test_strictly_on_policy_all_are_reinforce_and_the_gradient_is_known_before(settings):
    batch, loss = Batch(seed=9), loss_of(aggregation="token_mean", **settings)
    _, _, gradient = batch.cut(loss, [[0, 1, 2], [3, 4, 5, 6]], on_policy=True)
    each = [-a / sum(batch.lengths) for a, n in zip(batch.advantage, batch.lengths, strict=True) for _ in range(n)]
    assert_close(gradient, torch.tensor(each), rtol=1e-5, atol=1e-8)


def test_one_far_token_moves_its_whole_responses_ratio_under_gspo_and_only_itself_under_ppo():
    logp, old = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-1.0, -1.0, -1.9])
    inputs = LossInputs(torch.ones(3), torch.full((3,), 1 / 3), old_logp=old, lengths=[3])
    ratio = {}
    for name in ("gspo", "ppo_clip"):
        value = logp.clone().requires_grad_()
        loss, _ = loss_of(name=name, aggregation="sequence_mean", clip_low=0.2, clip_high=0.2)(
            TokenStats(logp=value), inputs
        )
        loss.backward()
        ratio[name] = value.grad
    assert ratio["gspo"].abs().max() == 0  # exp(.3) > 1.2: the whole response is clipped
    assert (ratio["ppo_clip"] != 0).tolist() == [True, True, False]


def test_gspo_without_the_ends_of_responses_is_an_error():
    inputs = LossInputs(torch.ones(2), torch.ones(2), old_logp=torch.zeros(2))
    with pytest.raises(ValueError, match="where responses end"):
        loss_of(name="gspo")(TokenStats(logp=torch.zeros(2)), inputs)
    inputs = LossInputs(torch.ones(2), torch.ones(2), old_logp=torch.zeros(2), lengths=[3])
    with pytest.raises(ValueError, match="3 tokens in all, and log-probs of 2"):
        loss_of(name="gspo")(TokenStats(logp=torch.zeros(2)), inputs)


@pytest.mark.parametrize("settings", CASES)
def test_an_empty_micro_batch_adds_nothing(settings):
    logp = torch.zeros(0, requires_grad=True)
    empty = torch.zeros(0)
    value, _ = loss_of(**settings)(TokenStats(logp=logp), LossInputs(empty, empty, empty, lengths=[], held=empty))
    value.backward()
    assert float(value) == 0


class TestHeldTokens:
    def brute_force(self, logp, advantage, share):
        n = len(logp)
        a, b = sum(logp) / n, sum(advantage) / n
        covariance = [(x - a) * (y - b) for x, y in zip(logp, advantage, strict=True)]
        limit = sorted(covariance, reverse=True)[max(1, int(share * n)) - 1]
        return [float(c >= limit) for c in covariance]

    @pytest.mark.parametrize("share", [0.001, 0.05, 0.5])
    @pytest.mark.parametrize("cuts", [(0, 60), (0, 10, 60), (0, 0, 31, 60)])
    def test_they_are_those_of_a_brute_force_however_tokens_are_spread(self, share, cuts):
        rng = random.Random(1)
        logp = [math.log(rng.random()) for _ in range(60)]
        advantage = [rng.choice([-1.0, 0.5, 2.0]) for _ in range(60)]
        shares = list(pairwise(cuts))

        def work(rank, total, gather):
            a, b = shares[rank]
            own = torch.tensor(logp[a:b], dtype=torch.float64), torch.tensor(advantage[a:b], dtype=torch.float64)
            return held_tokens(*own, share, total=total, gather=gather)

        held = torch.cat(Replicas(len(shares)).run(work))
        assert held.tolist() == self.brute_force(logp, advantage, share)
        assert held.sum() == max(1, int(share * 60))

    def test_no_tokens_at_all_hold_none(self):
        assert held_tokens(torch.zeros(0), torch.zeros(0), 0.5).tolist() == []


def test_each_loss_starts_from_its_own_settings():
    loss = AlgorithmSection(loss={"name": "gspo"}).loss
    assert (loss.clip_low, loss.clip_high) == (3e-4, 4e-4)
    assert AlgorithmSection(loss={"name": "kl_cov"}).loss.share == 2e-3
    assert AlgorithmSection(loss={"name": "cispo"}).loss.clip_low == 1.0
