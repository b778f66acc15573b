"""The policy loss against scalar arithmetic in float64, and its invariance to sharding."""

import math
import random

import pytest
import torch
from torch.testing import assert_close

from megatron_urlvr.algorithms.losses import LossInputs, build_loss, log_ratio, ppo_clip, token_weights
from megatron_urlvr.config.algorithm import KLSection, LossSection
from megatron_urlvr.types import TokenStats

AGGREGATIONS = ["token_mean", "sequence_mean", "fixed_length"]
MAX_NEW = 12


class Batch:
    """Responses with random lengths, advantages and log-probs, as lists of Python floats."""

    def __init__(self, seed, sequences=9):
        rng = random.Random(seed)
        self.lengths = [rng.randint(1, MAX_NEW) for _ in range(sequences)]
        self.advantage = [rng.gauss(0, 1) for _ in self.lengths]
        # steps of .37 keep every ratio clear of the kinks at the bounds
        self.logp = [[-rng.random() * 3 for _ in range(t)] for t in self.lengths]
        self.old = [[x + 0.37 * rng.choice([-4, -1, 0.3, 1, 4]) for x in row] for row in self.logp]
        self.ref = [[x + rng.gauss(0, 0.5) for x in row] for row in self.logp]

    def oracle(self, logp, *, low, high, dual, coef, estimator, aggregation, on_policy):
        """The objective as it is printed, one token after the other."""
        total = 0.0
        for i, row in enumerate(logp):
            for t, x in enumerate(row):
                old = self.logp[i][t] if on_policy else self.old[i][t]
                r, a = math.exp(x - old), self.advantage[i]
                objective = min(r * a, min(max(r, 1 - low), 1 + high) * a)
                if dual is not None and a < 0:
                    objective = max(objective, dual * a)
                d = x - self.ref[i][t]
                k = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[estimator]
                value = -objective + coef * k
                if aggregation == "token_mean":
                    total += value / sum(self.lengths)
                elif aggregation == "sequence_mean":
                    total += value / len(row) / len(self.lengths)
                else:
                    total += value / MAX_NEW / len(self.lengths)
        return total

    def pieces(self, parts, aggregation, *, on_policy, coef=0.0):
        """Micro-batches of the samples in `parts`, each its own leaf of log-probs."""
        for part in parts:
            lengths = torch.tensor([self.lengths[i] for i in part])
            weight = token_weights(
                lengths,
                aggregation,
                total_tokens=sum(self.lengths),
                total_sequences=len(self.lengths),
                max_new_tokens=MAX_NEW,
            )
            flat = lambda rows: torch.tensor([x for i in part for x in rows[i]])  # noqa: B023, E731
            advantage = torch.tensor([self.advantage[i] for i in part])
            yield (
                flat(self.logp).requires_grad_(),
                LossInputs(
                    advantage=torch.repeat_interleave(advantage, lengths),
                    weight=weight,
                    old_logp=None if on_policy else flat(self.old),
                    ref_logp=flat(self.ref) if coef else None,
                ),
            )

    def flat(self, rows):
        return [x for row in rows for x in row]


def run(batch, parts, loss, aggregation, *, on_policy, coef=0.0):
    """Summed loss and metrics of `parts`, and the gradients in the samples' order."""
    total, sums, gradients = 0.0, {}, {}
    for part, (logp, inputs) in zip(
        parts, batch.pieces(parts, aggregation, on_policy=on_policy, coef=coef), strict=True
    ):
        stats = TokenStats(logp=logp, entropy=logp.detach().abs())
        value, metrics = loss(stats, inputs)
        value.backward()
        total += value.item()
        for name, metric in metrics.items():
            assert not metric.requires_grad
            sums[name] = sums.get(name, 0.0) + metric.item()
        rows = torch.split(logp.grad, [batch.lengths[i] for i in part])
        gradients.update(zip(part, rows, strict=True))
    return total, sums, torch.cat([gradients[i] for i in range(len(batch.lengths))])


def numerical_gradient(batch, **kwargs):
    """Central differences of the oracle in every token's log-prob, float64."""
    out = []
    for i, row in enumerate(batch.logp):
        for t in range(len(row)):
            moved = [[list(r) for r in batch.logp] for _ in range(2)]
            moved[0][i][t] += 1e-6
            moved[1][i][t] -= 1e-6
            out.append((batch.oracle(moved[0], **kwargs) - batch.oracle(moved[1], **kwargs)) / 2e-6)
    return torch.tensor(out)


def make_loss(low, high, dual, coef, estimator, aggregation):
    section = LossSection(clip_low=low, clip_high=high, dual_clip=dual, aggregation=aggregation)
    return build_loss(section, KLSection(coef=coef, estimator=estimator))


@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(
    ("low", "high", "dual", "coef", "estimator"),
    [(0.2, 0.2, None, 0.0, "k3"), (0.2, 0.28, 3.0, 0.0, "k3"), (0.1, 0.4, 2.0, 0.5, "k1"), (0.2, 0.2, None, 0.3, "k2"),
     (0.2, 0.28, 3.0, 0.7, "k3")],
)  # fmt: skip
def test_loss_and_gradient_are_those_of_scalar_arithmetic(low, high, dual, coef, estimator, aggregation, on_policy):
    batch = Batch(seed=4)
    kwargs = {"low": low, "high": high, "dual": dual, "coef": coef, "estimator": estimator}
    kwargs |= {"aggregation": aggregation, "on_policy": on_policy}
    loss = make_loss(low, high, dual, coef, estimator, aggregation)
    whole = [list(range(len(batch.lengths)))]
    value, _, gradient = run(batch, whole, loss, aggregation, on_policy=on_policy, coef=coef)
    assert value == pytest.approx(batch.oracle(batch.logp, **kwargs), rel=1e-5, abs=1e-6)
    assert_close(gradient.double(), numerical_gradient(batch, **kwargs).double(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("parts", [[[0, 1, 2, 3], [4, 5, 6, 7, 8]], [[8], [3, 1], [0, 2, 7, 5], [6, 4]]])
def test_sharding_changes_neither_loss_nor_gradients_nor_metrics(parts, aggregation, on_policy):
    batch = Batch(seed=11)
    loss = make_loss(0.2, 0.28, 3.0, 0.1, "k3", aggregation)
    whole = run(batch, [list(range(9))], loss, aggregation, on_policy=on_policy, coef=0.1)
    split = run(batch, parts, loss, aggregation, on_policy=on_policy, coef=0.1)
    assert split[0] == pytest.approx(whole[0], rel=1e-5, abs=1e-7)
    assert_close(split[2], whole[2], rtol=1e-6, atol=1e-9)
    one, other = loss.finish(whole[1]), loss.finish(split[1])
    assert one.keys() == other.keys()
    for name in one:
        assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_metrics_are_means_whatever_the_aggregation(aggregation):
    batch = Batch(seed=2)
    loss = make_loss(0.2, 0.3, 2.0, 0.4, "k3", aggregation)
    _, sums, _ = run(batch, [[0, 1, 2], [3, 4, 5, 6, 7, 8]], loss, aggregation, on_policy=False, coef=0.4)
    metrics = loss.finish(sums)

    weights = [1 / t if aggregation == "sequence_mean" else 1.0 for t in batch.lengths for _ in range(t)]
    ratios = [math.exp(x - o) for x, o in zip(batch.flat(batch.logp), batch.flat(batch.old), strict=True)]
    advantages = [a for a, t in zip(batch.advantage, batch.lengths, strict=True) for _ in range(t)]
    diffs = [x - q for x, q in zip(batch.flat(batch.logp), batch.flat(batch.ref), strict=True)]

    def mean(values):
        return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)

    cut = [(a > 0 and r > 1.3) or (a < 0 and r < 0.8) for a, r in zip(advantages, ratios, strict=True)]
    assert metrics["policy/clip_fraction"] == pytest.approx(mean(cut), rel=1e-5)
    dual = [a < 0 and r > 2.0 for a, r in zip(advantages, ratios, strict=True)]
    assert metrics["policy/dual_clip_fraction"] == pytest.approx(mean(dual), rel=1e-5)
    assert metrics["policy/ratio"] == pytest.approx(mean(ratios), rel=1e-5)
    assert metrics["policy/approx_kl"] == pytest.approx(mean([r - 1 - math.log(r) for r in ratios]), rel=1e-5)
    assert metrics["kl/ref"] == pytest.approx(mean([math.exp(-d) - 1 + d for d in diffs]), rel=1e-5)
    assert metrics["train/entropy"] == pytest.approx(mean([abs(x) for x in batch.flat(batch.logp)]), rel=1e-5)
    assert any(cut)
    assert any(dual)


def test_strictly_on_policy_the_gradient_is_reinforce_and_nothing_is_clipped():
    batch = Batch(seed=7)
    loss = make_loss(0.0, 0.0, None, 0.0, "k3", "token_mean")
    _, sums, gradient = run(batch, [list(range(9))], loss, "token_mean", on_policy=True)
    expected = [-a / sum(batch.lengths) for a, t in zip(batch.advantage, batch.lengths, strict=True) for _ in range(t)]
    assert_close(gradient, torch.tensor(expected), rtol=1e-6, atol=1e-9)
    metrics = loss.finish(sums)
    assert metrics["policy/clip_fraction"] == 0
    assert metrics["policy/ratio"] == pytest.approx(1)
    assert metrics["policy/approx_kl"] == 0


def test_old_log_probs_equal_to_the_new_ones_give_the_on_policy_gradient():
    batch = Batch(seed=7)
    batch.old = batch.logp
    loss = make_loss(0.2, 0.2, None, 0.0, "k3", "sequence_mean")
    on = run(batch, [list(range(9))], loss, "sequence_mean", on_policy=True)
    off = run(batch, [list(range(9))], loss, "sequence_mean", on_policy=False)
    assert on[0] == off[0]
    assert torch.equal(on[2], off[2])


@pytest.mark.parametrize(("advantage", "old"), [(1.0, -300.0), (-1.0, -300.0), (1.0, 300.0), (-1.0, 300.0)])
def test_far_off_policy_tokens_leave_the_gradient_finite(advantage, old):
    logp = torch.tensor([-0.5], requires_grad=True)
    difference = log_ratio(logp, torch.tensor([old]))
    ppo_clip(difference.exp(), torch.tensor([advantage]), clip_low=0.2, clip_high=0.2).loss.sum().backward()
    assert logp.grad.isfinite().all()


@pytest.mark.parametrize("coef", [0.0, 0.1])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_an_empty_micro_batch_adds_nothing_and_can_be_differentiated(aggregation, coef):
    loss = make_loss(0.2, 0.2, None, coef, "k3", aggregation)
    none = torch.tensor([], dtype=torch.long)
    weight = token_weights(none, aggregation, total_tokens=5, total_sequences=2, max_new_tokens=4)
    logp = torch.zeros(0, requires_grad=True)
    value, metrics = loss(TokenStats(logp=logp), LossInputs(advantage=torch.zeros(0), weight=weight))
    value.backward()
    assert value.item() == 0
    assert all(metric.item() == 0 for metric in metrics.values())
    one = torch.ones(1)
    _, full = loss(TokenStats(logp=-one), LossInputs(one, one, ref_logp=-one))
    assert metrics.keys() == full.keys()  # ranks that have nothing take part in the same reductions


def test_padding_of_weight_zero_adds_nothing():
    loss = make_loss(0.2, 0.2, None, 0.0, "k3", "token_mean")
    weight = torch.tensor([0.5, 0.5, 0.0])
    logp = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    value, metrics = loss(TokenStats(logp=logp), LossInputs(torch.tensor([1.0, 1.0, 9.0]), weight))
    value.backward()
    assert value.item() == pytest.approx(-1.0)
    assert logp.grad.tolist() == [-0.5, -0.5, 0.0]
    assert metrics["policy/ratio"].item() == pytest.approx(1.0)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_the_weights_of_a_whole_batch_sum_to_one(aggregation):
    lengths = torch.tensor([3, 1, 12, 7])
    weights = token_weights(lengths, aggregation, total_tokens=23, total_sequences=4, max_new_tokens=MAX_NEW)
    assert weights.shape == (23,)
    assert weights.sum().item() == pytest.approx(1.0)


def test_fixed_length_gives_every_token_of_every_batch_the_same_weight():
    one = token_weights(torch.tensor([3, 5]), "fixed_length", total_tokens=8, total_sequences=2, max_new_tokens=10)
    other = token_weights(torch.tensor([9, 1]), "fixed_length", total_tokens=10, total_sequences=2, max_new_tokens=10)
    assert one.tolist() == pytest.approx([0.05] * 8)
    assert other.tolist() == pytest.approx([0.05] * 10)


def test_a_kl_in_the_reward_leaves_the_loss_alone():
    loss = build_loss(LossSection(), KLSection(coef=0.5, place="reward"))
    assert not loss.needs_reference
    assert loss.kl_coef == 0
    assert build_loss(LossSection(), KLSection(coef=0.5)).needs_reference


def test_a_missing_reference_is_an_error():
    loss = build_loss(LossSection(), KLSection(coef=0.5))
    inputs = LossInputs(advantage=torch.ones(2), weight=torch.ones(2))
    with pytest.raises(ValueError, match=r"algorithm\.kl\.coef is 0\.5.*reference"):
        loss(TokenStats(logp=torch.zeros(2)), inputs)


def test_inputs_of_another_length_are_an_error_and_never_broadcast():
    loss = build_loss(LossSection(), KLSection())
    inputs = LossInputs(advantage=torch.ones(1), weight=torch.ones(3))
    with pytest.raises(ValueError, match=r"\(3,\).*advantage \(1,\)"):
        loss(TokenStats(logp=torch.zeros(3)), inputs)
