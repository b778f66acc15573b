"""Two processes, in every layout, against one: the same statistics, rewards, losses, gradients, weights and metrics.

Rollouts are replayed and every update starts from the same weights, in float32, so that only the order of additions
differs. The model's vocabulary (29) is odd, larger than the tokenizer's (21) and padded to 30 at TP=2.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from checkpoint_cases import CHAIN, CHAIN_OF_EXPERTS
from gradients import relative_differences
from layout_cases import DIRECT, REWARDS, STEPS, Case, Observed, Seen, family_rows
from safetensors.torch import load_file
from tiny_models import FAMILIES, hf_model, oracle_stats

from megatron_urlvr.rollout.records import read_records
from megatron_urlvr.rollout.replay import rollout_file
from megatron_urlvr.types import STATISTICS

pytestmark = pytest.mark.timeout(600)  # the first test of a group waits for its processes
STATISTIC = 1e-5
"""Absolute, nats. A float32 step of a log-prob near -16 is 1e-6; micro-batches of other sizes add in another order."""
FAMILY = 1e-4
"""The same, against transformers in float64."""
REWARD = 1e-5
"""Relative, or absolute where a value is below 1."""
ADVANTAGE = 2e-4
"""The same. Standardised scores of a group are differences of rewards that may lie close together."""
GRADIENT = 1e-5
"""Of a tensor's largest entry."""


@pytest.fixture(params=["untied", "tied"])
def case(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Case:
    return cases[request.param]


@pytest.fixture
def one(case: Case, alone: dict[str, Seen]) -> Observed:
    return alone[case.name].ranks[0]


@pytest.fixture
def two(case: Case, together: dict[str, Seen]) -> list[Observed]:
    return together[case.name].ranks


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=tolerance, atol=tolerance)


def test_every_prompt_is_some_replicas_and_ranks_of_a_replica_agree_to_the_bit(one: Observed, two: list[Observed]):
    assert {prompt for seen in two for prompt in seen.stats} == set(one.stats)
    if two[0].replica == two[1].replica:
        for field in ("stats", "reference_stats", "rewards", "advantages"):
            assert_same_bits(getattr(two[1], field), getattr(two[0], field))
        assert two[0].metrics == two[1].metrics
    else:
        assert not set(two[0].stats) & set(two[1].stats)
        assert [dict(m) for m in two[0].metrics] == [dict(m) for m in two[1].metrics]
    for k in range(len(one.gradients)):
        assert_same_bits(two[0].gradients[k], two[1].gradients[k])


def assert_same_bits(found, expected):
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
        return
    assert found.keys() == expected.keys()
    for key in expected:
        assert_same_bits(found[key], expected[key])


@pytest.mark.parametrize("name", sorted(STATISTICS))
def test_statistics(one: Observed, two: list[Observed], name: str):
    for seen in two:
        for prompt, stats in seen.stats.items():
            assert (stats[name] - one.stats[prompt][name]).abs().max() < STATISTIC


def test_log_probs_under_the_reference(one: Observed, two: list[Observed]):
    for seen in two:
        for prompt, logp in seen.reference_stats.items():
            assert (logp - one.reference_stats[prompt]).abs().max() < STATISTIC
            assert not torch.equal(logp, seen.stats[prompt]["logp"])


@pytest.mark.parametrize("name", FAMILIES)
def test_log_probs_of_every_family_are_transformers_own(family_scores, families, layout_name: str, name: str):
    if name == "qwen3_moe" and layout_name == "tp2":
        assert all(name not in found for found in family_scores)
        return
    model = hf_model(families[name])
    for found in family_scores:
        for row, logp in zip(family_rows(), found[name], strict=True):
            assert (logp.double() - oracle_stats(model, row)["logp"]).abs().max() < FAMILY


@pytest.mark.parametrize("name", REWARDS)
def test_every_reward(one: Observed, two: list[Observed], name: str):
    for seen in two:
        for prompt, rewards in seen.rewards.items():
            labels = [label for label in rewards if label.rsplit(" ", 1)[0] == name]
            assert labels
            for label in [*labels, "total"]:
                assert close(rewards[label], one.rewards[prompt][label], REWARD)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
def test_advantages(one: Observed, two: list[Observed], name: str):
    for seen in two:
        for prompt, advantages in seen.advantages.items():
            assert close(advantages[name], one.advantages[prompt][name], ADVANTAGE)


def test_mini_batches_hold_the_same_prompts(one: Observed, two: list[Observed]):
    replicas = two if two[0].replica != two[1].replica else two[:1]
    for k, members in enumerate(one.members):
        assert sorted(members) == sorted(prompt for seen in replicas for prompt in seen.members[k])


def of_any_layout(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics but for those of how work was spread over replicas, and how often a prompt was computed."""
    return {k: value for k, value in metrics.items() if not k.startswith("balance/") and k != "train/tflop"}


def test_losses_and_metrics_of_each_update(one: Observed, two: list[Observed]):
    for seen in two:
        assert len(seen.metrics) == len(one.metrics) == 4
        for metrics, expected in zip(seen.metrics, one.metrics, strict=True):
            found, wanted = of_any_layout(metrics), of_any_layout(expected)
            assert found.keys() == wanted.keys()
            for name in wanted:
                assert found[name] == pytest.approx(wanted[name], rel=1e-5, abs=1e-6), name
            assert 0 < expected["policy/clip_fraction"] < 1
            assert expected["kl/ref"] > 0


def test_every_parameters_gradient(case: Case, one: Observed, two: list[Observed]):
    names = set(load_file(case.model / "model.safetensors"))
    for seen in two:
        for found, expected in zip(seen.gradients, one.gradients, strict=True):
            assert set(expected) == names
            assert_close_gradients(found, expected)
            assert all(expected[name].abs().max() > 0 for name in names)


def assert_close_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    differences = relative_differences(found, expected)
    worst = max(differences, key=lambda name: differences[name])
    assert differences[worst] < GRADIENT, f"{worst}: {differences[worst]:.1e}"


@pytest.mark.parametrize("name", DIRECT)
def test_gradients_of_losses_minimised_directly(one: Observed, two: list[Observed], name: str):
    for seen in two:
        assert_close_gradients(seen.direct[name], one.direct[name])


def test_exported_weights_are_the_folders_bit_for_bit_on_every_rank(case: Case, two: list[Observed]):
    held = load_file(case.model / "model.safetensors")
    for seen in two:
        assert_same_bits(seen.exported, held)


def test_ranks_hold_the_same_weights_after_a_step(one: Observed, two: list[Observed]):
    assert_same_bits(two[1].stepped, two[0].stepped)
    moved = {name: float((tensor - one.exported[name]).abs().max()) for name, tensor in one.stepped.items()}
    assert min(moved.values()) > 1e-3
    # AdamW scales a gradient near zero up to a whole step, so that rounding can turn one round: nearly all agree.
    for name, tensor in two[0].stepped.items():
        off = (tensor - one.stepped[name]).abs()
        assert float((off > 1e-4).float().mean()) < 0.01, name


def test_replicas_have_rows_for_different_numbers_of_micro_batches_and_compute_as_many(
    layout_name: str, two: list[Observed]
):
    if not layout_name.startswith("dp2"):
        assert two[0].microbatches == two[1].microbatches
        assert not any(name.startswith("balance/") for seen in two for each in seen.metrics for name in each)
        return
    assert any(a != b for a, b in zip(two[0].microbatches, two[1].microbatches, strict=True))
    for metrics in two[0].metrics:
        assert metrics["balance/before"] > 1.2
        assert metrics["balance/after"] < 1.05


def assert_same_metrics(found: list[dict[str, float]], expected: list[dict[str, float]]):
    for now, before in zip(found, expected, strict=True):
        assert now.keys() == before.keys()
        for name, value in before.items():
            if not name.startswith("time/"):
                assert math.isfinite(value)
                assert now[name] == pytest.approx(value, rel=1e-4, abs=1e-5), f"step {before['step']}, {name}"


def rows_of(run: Path) -> list[dict[str, float]]:
    return [of_any_layout(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_embedded_engine_samples_the_same_with_weights_gathered_from_any_layout(
    alone: dict[str, Seen], together: dict[str, Seen]
):
    """Each sample's draws are its own, and the weights are gathered exactly: replicas draw what one process would."""
    one, two = alone["tied"].sampled, together["tied"].sampled
    expected, found = (
        {record["prompt"]["id"]: record for record in read_records(rollout_file(run, 1))} for run in (one, two)
    )
    assert found.keys() == expected.keys()
    for prompt, record in expected.items():
        for mine, theirs in zip(found[prompt]["samples"], record["samples"], strict=True):
            assert (mine["tokens"], mine["finish"]) == (theirs["tokens"], theirs["finish"])
    assert_same_metrics(rows_of(two), rows_of(one))
    assert any(name.startswith("eval/held_out/base/") for name in rows_of(one)[0])


def test_three_steps_of_training_give_one_processs_metrics(
    case: Case, alone: dict[str, Seen], together: dict[str, Seen]
):
    expected, found = rows_of(alone[case.name].run), rows_of(together[case.name].run)
    assert [row["step"] for row in found] == list(range(STEPS + 1))
    assert_same_metrics(found, expected)


def test_training_goes_on_at_another_layout_from_a_checkpoint(chain):
    """TP, PP, DP and interleaved stages, one after the other and back to one process: weights, both moments and the
    step count of AdamW, the moving average. A lost step count changes the first step after it by several percent."""
    assert_same_training([*CHAIN, "alone"], *chain)


def test_a_mixtures_training_goes_on_from_a_checkpoint_however_its_experts_are_spread(chain_of_experts):
    assert_same_training([*CHAIN_OF_EXPERTS, "alone"], *chain_of_experts)


def assert_same_training(names: list[str], handed: list, alone: list):
    for name, found, expected in zip(names, handed, alone, strict=True):
        for now, before in zip(found, expected, strict=True):
            for key, value in of_any_layout(before).items():
                assert now[key] == pytest.approx(value, rel=1e-3), f"{name}: {key}"
