"""Direct minimisation: each loss against its formula written out in float64, gradients included."""

import math

import pytest
import torch

from megatron_urlvr.algorithms.direct import build_objective
from megatron_urlvr.algorithms.losses import LossInputs, PolicyLoss, token_weights
from megatron_urlvr.config.algorithm import AlgorithmSection, DirectSection, KLSection, LossSection, RLSCSection
from megatron_urlvr.types import TokenStats

V = 7
LENGTHS = [3, 1, 4]


def sampled() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `[8, V]` float64 of three responses laid end to end, and the tokens that were drawn."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(sum(LENGTHS), V, generator=generator, dtype=torch.float64) * 2
    return logits, torch.randint(0, V, (sum(LENGTHS),), generator=generator)


def statistics(logits: torch.Tensor, tokens: torch.Tensor) -> TokenStats:
    """By definition, from the whole softmax."""
    logp = logits.log_softmax(-1)
    return TokenStats(
        logp=logp.gather(-1, tokens[:, None])[:, 0],
        entropy=-(logp.exp() * logp).sum(-1),
        self_certainty=-logp.mean(-1) - math.log(V),
    )


def weights(aggregation: str = "token_mean") -> torch.Tensor:
    return token_weights(
        torch.tensor(LENGTHS),
        aggregation,  # type: ignore[arg-type]
        total_tokens=sum(LENGTHS),
        total_sequences=len(LENGTHS),
        max_new_tokens=4,
    ).double()


def loss_and_gradient(section: DirectSection | RLSCSection) -> tuple[float, torch.Tensor]:
    """The program's loss and its gradient with respect to the logits."""
    logits, tokens = sampled()
    logits.requires_grad_()
    stats = statistics(logits, tokens)
    loss = build_objective(section, KLSection())
    assert stats.logp is not None
    each = loss.coefficients([0.0] * 3, list(stats.logp.detach().split(LENGTHS)))
    coefficient = torch.tensor(each, dtype=torch.float64).repeat_interleave(torch.tensor(LENGTHS))
    value, _ = loss(stats, LossInputs(advantage=coefficient, weight=weights()))
    value.backward()
    assert logits.grad is not None
    return float(value.detach()), logits.grad


def test_em_ft_is_the_mean_token_entropy_and_descends_it() -> None:
    logits, _ = sampled()
    p = logits.softmax(-1)
    entropy = -(p * p.log()).sum(-1)
    # dH/dz_i = -p_i (log p_i + H)
    expected = -p * (p.log() + entropy[:, None]) / len(logits)
    value, gradient = loss_and_gradient(DirectSection(name="em_ft"))
    assert value == pytest.approx(float(entropy.mean()), rel=1e-7)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)


def test_negative_self_certainty_pulls_every_logit_away_from_the_mean() -> None:
    logits, _ = sampled()
    p = logits.softmax(-1)
    value, gradient = loss_and_gradient(DirectSection(name="self_certainty"))
    divergence = -(p.log().mean(-1)) - math.log(V)  # KL(U || p)
    assert value == pytest.approx(-float(divergence.mean()), rel=1e-7)
    # d(-KL(U || p))/dz_i = 1/V - p_i
    torch.testing.assert_close(gradient, (1 / V - p) / len(logits), rtol=1e-6, atol=1e-9)


def test_rlsc_weighs_each_response_by_its_own_probability_plus_alpha() -> None:
    logits, tokens = sampled()
    p = logits.softmax(-1)
    rows = torch.arange(len(tokens))
    probability = torch.stack([part.prod() for part in p[rows, tokens].split(LENGTHS)])
    coefficient = (probability + 0.25).repeat_interleave(torch.tensor(LENGTHS))
    one_hot = torch.nn.functional.one_hot(tokens, V).double()
    value, gradient = loss_and_gradient(RLSCSection(alpha=0.25))
    assert value == pytest.approx(-float((coefficient * p[rows, tokens].log()).mean()), rel=1e-7)
    torch.testing.assert_close(gradient, -coefficient[:, None] * (one_hot - p) / len(tokens), rtol=1e-6, atol=1e-9)


def test_rewards_and_advantages_play_no_part_in_a_direct_loss() -> None:
    loss = build_objective(DirectSection(name="em_ft"), KLSection())
    assert loss.coefficients([5.0, -3.0], [torch.zeros(2), torch.zeros(1)]) == [1.0, 1.0]
    clip = build_objective(LossSection(), KLSection())
    assert isinstance(clip, PolicyLoss)
    assert clip.coefficients([5.0, -3.0], [torch.zeros(2), torch.zeros(1)]) == [5.0, -3.0]


def test_a_direct_loss_takes_a_divergence_from_the_reference() -> None:
    logits, tokens = sampled()
    stats = statistics(logits, tokens)
    assert stats.logp is not None
    loss = build_objective(DirectSection(name="em_ft"), KLSection(coef=0.5, estimator="k2"))
    assert loss.needs == {"entropy", "logp"}
    inputs = LossInputs(torch.ones(8).double(), weights(), ref_logp=stats.logp - 0.2)
    value, sums = loss(stats, inputs)
    assert stats.entropy is not None
    assert value.item() == pytest.approx(float(stats.entropy.mean()) + 0.5 * 0.02, rel=1e-6)
    assert loss.finish({name: float(v) for name, v in sums.items()})["kl/ref"] == pytest.approx(0.02, rel=1e-6)


def test_another_loss_starts_from_its_own_settings() -> None:
    section = AlgorithmSection.model_validate({"loss": {"name": "rlsc", "alpha": 0.5, "aggregation": "sequence_mean"}})
    assert isinstance(section.loss, RLSCSection)
    parent = {"name": "ppo_clip", "clip_low": 0.1, "aggregation": "fixed_length"}
    assert LossSection.surviving(parent, {"name": "em_ft"}) == {"aggregation": "fixed_length"}
    with pytest.raises(ValueError, match="alpha"):
        AlgorithmSection.model_validate({"loss": {"name": "em_ft", "alpha": 0.5}})
