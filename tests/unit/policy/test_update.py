"""The update step: gradients against autograd on the transformers model, steps against torch's AdamW."""

import copy
import math
from pathlib import Path

import pytest
import torch
from gradients import hf_gradients, policy_gradients, relative_differences, weigh_equally
from tiny_models import hf_model, oracle_stats, random_rows
from torch.utils.flop_counter import FlopCounterMode
from training import assert_same_bits, everything

from megatron_urlvr.algorithms.losses import LossInputs, build_loss
from megatron_urlvr.config.algorithm import KLSection, LossSection
from megatron_urlvr.config.optim import OptimSection
from megatron_urlvr.policy.batch import Row
from megatron_urlvr.policy.optimizer import NonFiniteError
from megatron_urlvr.policy.policy import Policy
from megatron_urlvr.types import TokenStats

VOCAB = 29
TOLERANCE = 1e-5
FROZEN = OptimSection(lr=1e-3, clip_grad=0.0)
CLIP = {"low": 0.2, "high": 0.28}


def trained_rows(
    folder: Path, count: int = 16, *, seed: int = 0, vocab: int = VOCAB, old: bool = True, ref: bool = False
) -> list[Row]:
    """Rows with advantages of both signs, uneven weights, and log-probs of policies that are some way off."""
    rows = random_rows(count, vocab=vocab, seed=seed)
    generator = torch.Generator().manual_seed(seed + 100)
    model = hf_model(folder)
    for row in rows:
        logp = oracle_stats(model, row)["logp"].float()
        row.advantage = float(torch.randn((), generator=generator))
        row.weight = torch.rand(len(logp), generator=generator) / 50
        row.old_logp = logp + 0.3 * torch.randn(len(logp), generator=generator) if old else None
        row.ref_logp = logp + 0.3 * torch.randn(len(logp), generator=generator) if ref else None
    return rows


def clip_loss(kl: float = 0.0):
    return build_loss(LossSection(clip_low=CLIP["low"], clip_high=CLIP["high"]), KLSection(coef=kl))


def assert_gradients_of_transformers(policy: Policy, folder: Path, rows: list[Row], *, kl: float = 0.0, **oracle):
    metrics = policy.update(rows, clip_loss(kl), lr=0.0)
    loss, expected = hf_gradients(hf_model(folder), rows, kl=kl, **CLIP, **oracle)
    assert metrics["train/loss"] == pytest.approx(loss, abs=1e-6)
    squares = sum(float(gradient.square().sum()) for gradient in expected.values())
    assert metrics["train/grad_norm"] == pytest.approx(math.sqrt(squares), rel=TOLERANCE)
    differences = relative_differences(policy_gradients(policy), expected)
    assert max(differences.values()) < TOLERANCE, max(differences.items(), key=lambda item: item[1])


@pytest.mark.parametrize("share_prefix", [True, False], ids=["shared prefixes", "whole sequences"])
@pytest.mark.parametrize(
    ("name", "budget"), [("untied", 1), ("untied", 1000), ("untied", 30), ("tied", 30), ("full", 30), ("single", 30)]
)
def test_gradients_of_the_clipped_loss_are_autograds(make_policy, folders, name: str, budget: int, share_prefix: bool):
    parallel = {"share_prefix": share_prefix, "max_tokens_per_microbatch": budget}
    policy = make_policy(name, optim=FROZEN, parallel=parallel)
    assert_gradients_of_transformers(policy, folders[name], trained_rows(folders[name]))


def test_gradients_on_policy_need_no_old_log_probs(make_policy, folders):
    policy = make_policy(optim=FROZEN)
    assert_gradients_of_transformers(policy, folders["untied"], trained_rows(folders["untied"], old=False))


def test_gradients_of_a_divergence_in_the_loss(make_policy, folders):
    policy = make_policy("tied", optim=FROZEN)
    assert_gradients_of_transformers(policy, folders["tied"], trained_rows(folders["tied"], ref=True), kl=0.3)


def test_gradients_at_another_temperature_and_with_a_masked_vocabulary(make_policy, folders):
    policy = make_policy(optim=FROZEN, temperature=0.6, real_vocab=21)
    rows = trained_rows(folders["untied"], vocab=21)
    assert_gradients_of_transformers(policy, folders["untied"], rows, temperature=0.6, vocab=21)
    masked = policy_gradients(policy)["lm_head.weight"][21:]
    assert torch.count_nonzero(masked) == 0


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputing_activations_changes_no_gradient(make_policy, folders, recompute: str):
    policy = make_policy(optim=FROZEN, model={"recompute": recompute}, parallel={"max_tokens_per_microbatch": 30})
    assert_gradients_of_transformers(policy, folders["untied"], trained_rows(folders["untied"]))


def test_gradients_start_from_nothing_at_every_update(make_policy, folders):
    policy = make_policy(optim=FROZEN)
    policy.update(trained_rows(folders["untied"], seed=4), clip_loss(), lr=0.0)
    policy.score(trained_rows(folders["untied"], seed=6), frozenset({"entropy"}))
    assert_gradients_of_transformers(policy, folders["untied"], trained_rows(folders["untied"]))


def test_metrics_are_weighted_means_over_all_tokens(make_policy, folders):
    rows = trained_rows(folders["untied"], old=True)
    weigh_equally(rows)
    metrics = make_policy(optim=FROZEN, parallel={"max_tokens_per_microbatch": 20}).update(rows, clip_loss(), lr=0.0)
    model = hf_model(folders["untied"])
    ratios, entropies = [], []
    for row in rows:
        assert row.old_logp is not None
        stats = oracle_stats(model, row)
        ratios.append((stats["logp"] - row.old_logp.double()).exp())
        entropies.append(stats["entropy"])
    ratio = torch.cat(ratios)
    advantage = torch.cat([torch.full((len(row.response),), row.advantage) for row in rows])
    cut = ((advantage > 0) & (ratio > 1.28)) | ((advantage < 0) & (ratio < 0.8))
    assert metrics["policy/ratio"] == pytest.approx(float(ratio.mean()), rel=1e-5)
    assert metrics["train/entropy"] == pytest.approx(float(torch.cat(entropies).mean()), rel=1e-5)
    assert metrics["policy/clip_fraction"] == pytest.approx(float(cut.double().mean()), abs=1e-6)


def test_steps_are_adamws_with_clipping_and_no_decay_of_biases_and_norms(make_policy, folders):
    section = OptimSection(lr=1e-2, clip_grad=0.05, weight_decay=0.1, beta1=0.8, beta2=0.9, eps=1e-7)
    policy = make_policy(optim=section)
    model = copy.deepcopy(hf_model(folders["untied"]))
    decayed = [p for n, p in model.named_parameters() if p.dim() > 1]
    others = [p for n, p in model.named_parameters() if p.dim() == 1]
    oracle = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], betas=(0.8, 0.9), eps=1e-7
    )
    for step, lr in enumerate((1e-2, 5e-3, 2e-2)):
        rows = trained_rows(folders["untied"], seed=step, old=False)
        metrics = policy.update(rows, clip_loss(), lr=lr)
        hf_gradients(model, rows, **CLIP)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        assert float(norm) > 0.05
        assert metrics["train/grad_norm"] == pytest.approx(float(norm), rel=1e-4)
        assert metrics["train/lr"] == lr
        for group in oracle.param_groups:
            group["lr"] = lr
        oracle.step()
    expected = dict(model.named_parameters())
    for name, tensor in policy.export():
        off = (tensor.double() - expected[name]).abs().max()
        assert off < 2e-5, f"{name}: off by {float(off):.1e} after three steps of about 1e-2"


def test_rows_that_disagree_about_old_log_probs_are_refused(make_policy, folders):
    rows = trained_rows(folders["untied"])
    rows[3].old_logp = None
    with pytest.raises(ValueError, match="must all carry 'old_logp', or none"):
        make_policy(optim=FROZEN).update(rows, clip_loss(), lr=0.0)


# -- what is not finite -----------------------------------------------------------------------------------------------


class FiniteLossOfNaNGradient:
    """0 * sqrt(0): the value is 0, the derivative 0 * inf."""

    needs = frozenset({"logp"})

    def upstream(self, inputs: LossInputs) -> None:
        return None

    def __call__(self, stats: TokenStats, inputs: LossInputs):
        logp = stats.get("logp")
        return (logp * inputs.weight).sum() + 0.0 * (logp - logp.detach()).abs().sqrt().sum(), {}

    def finish(self, sums):
        return dict(sums)


@pytest.mark.parametrize("distributed", [False, True], ids=["plain optimizer", "distributed optimizer"])
def test_an_infinite_loss_or_a_nan_gradient_leaves_weights_and_moments_alone(make_policy, folders, distributed: bool):
    def fresh() -> Policy:
        policy = make_policy(
            optim=OptimSection(lr=1e-3, ema_decay=0.9), parallel={"distributed_optimizer": distributed}
        )
        policy.update(trained_rows(folders["untied"]), clip_loss(), lr=1e-3)
        return policy

    policy = fresh()
    before = everything(policy)
    assert any("exp_avg_sq" in name for name in before)
    rows = trained_rows(folders["untied"], seed=9)
    rows[2].advantage = math.inf
    with pytest.raises(NonFiniteError, match="loss is"):
        policy.update(rows, clip_loss(), lr=1e-3)
    assert_same_bits(everything(policy), before)
    with pytest.raises(NonFiniteError, match="gradient norm is nan"):
        policy.update(trained_rows(folders["untied"], seed=9), FiniteLossOfNaNGradient(), lr=1e-3)
    assert_same_bits(everything(policy), before)
    # Nothing of the failed steps is left over: the next update is what it would have been without them.
    never_failed = fresh()
    for each in (policy, never_failed):
        each.update(trained_rows(folders["untied"], seed=10), clip_loss(), lr=1e-3)
    assert_same_bits(everything(policy), everything(never_failed))
    assert any(name.startswith("ema ") for name in before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_optimizer_in_host_memory_takes_the_same_steps_and_leaves_the_devices_memory(
    make_policy, folders, dtype: str
):
    section = OptimSection(lr=1e-2, ema_decay=0.9)
    policies = [
        make_policy(optim=section.model_copy(update={"offload": offload}), model={"dtype": dtype})
        for offload in (False, True)
    ]
    batch = trained_rows(folders["untied"])
    for _ in range(3):
        found = [policy.update(batch, clip_loss(), lr=1e-2) for policy in policies]
        assert found[0] == found[1]
        moments = [
            each.untyped_storage().nbytes()
            for policy in policies
            for part in policy.optimizer.parts
            for state in part.optimizer.state.values()
            for each in (state["exp_avg"], state["exp_avg_sq"])
        ]
        assert any(moments)
        assert not any(moments[len(moments) // 2 :])
    plain, offloaded = policies
    assert_same_bits(dict(offloaded.parameters), dict(plain.parameters))
    assert_same_bits(offloaded.ema.tensors, plain.ema.tensors)


@pytest.mark.parametrize("distributed", [False, True])
def test_gradients_leave_their_memory_to_others_between_updates_and_change_nothing(
    make_policy, folders, distributed: bool
):
    held = {"distributed_optimizer": distributed}
    kept, lent = (make_policy(optim=OptimSection(lr=1e-2), parallel=held) for _ in range(2))
    batch = trained_rows(folders["untied"])
    weights = sum(parameter.numel() for parameter in lent.parameters.values())
    for _ in range(2):
        lent.offload()
        lent.offload()
        assert gradient_bytes(lent) == 0
        assert gradient_bytes(kept) >= 4 * weights
        assert_same_bits(dict(lent.export()), dict(kept.export()))
        mine, others = (policy.score(batch, frozenset({"logp"})) for policy in (lent, kept))
        assert all(torch.equal(a.logp, b.logp) for a, b in zip(mine, others, strict=True))
        assert lent.update(batch, clip_loss(), lr=1e-2) == kept.update(batch, clip_loss(), lr=1e-2)
        assert gradient_bytes(lent) == gradient_bytes(kept)
    assert_same_bits(everything(lent), everything(kept))


def gradient_bytes(policy: Policy) -> int:
    """Of all gradient buffers."""
    return sum(buffer.grad_data.untyped_storage().nbytes() for chunk in policy.trained for buffer in chunk.buffers)


def test_the_model_flops_of_an_update_are_three_forward_passes_by_torchs_counter(make_policy, folders):
    policy = make_policy(optim=OptimSection(lr=1e-3), parallel={"share_prefix": False})
    batch, reference, counted = trained_rows(folders["untied"]), hf_model(folders["untied"]), 0
    for row in batch:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            reference(torch.tensor([[*row.prompt, *row.response[:-1]]]), logits_to_keep=len(row.response))
        counted += counter.get_total_flops()
    found = policy.update(batch, clip_loss(), lr=1e-3)["train/tflop"]
    # Causal attention is half of the square that the counter sees.
    assert found == pytest.approx(3 * counted / 1e12, rel=0.1)
    assert found < 3 * counted / 1e12
