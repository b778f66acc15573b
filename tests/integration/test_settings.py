"""Every reward, advantage, loss and batch size trains, and does what its setting says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import Command, rows

from megatron_urlvr.config.loader import load_config
from megatron_urlvr.data.labels import LabelStore
from megatron_urlvr.policy.policy import Policy
from megatron_urlvr.rewards import available, get_reward
from megatron_urlvr.rollout.embedded import EmbeddedEngine
from megatron_urlvr.train import main

REQUIRED = {
    "length": {"target": 4, "sign": -1, "scale": 2},
    "self_certainty": {"aggregation": "mean"},
    "token_entropy": {"aggregation": "mean"},
    "trajectory_entropy": {"aggregation": "sum"},
}
"""Options without a default."""
VOTES = {"name": "votes", "of": "paraphrase", "samples": 2, "max_new_tokens": 12}
JUDGE = {
    "name": "judge",
    "template": "{question}{response}",
    "verdict": "whole",
    "yes": "1",
    "no": "2",
    "max_new_tokens": 4,
}
PROVIDERS = {
    "gated_vote": {"name": "checker"},
    "program": {"name": "checker", "checker": "steps"},
    "co_rewarding": VOTES,
    "self_verification": JUDGE,
}
"""Providers of what rewards need besides statistics, answers and labels."""
ALIVE = {"audit/accuracy", "reward/proxy", "response/length", "vote/majority_ratio", "train/grad_norm", "train/loss"}


@pytest.fixture
def train(config: Path, tmp_path: Path):
    """`train("optim.lr=0.1")` is the metrics of two steps without evaluation, one dict a step."""
    count = iter(range(100))

    def _train(*overrides: str) -> list[dict[str, Any]]:
        run = tmp_path / f"run{next(count)}"
        short = [f"run.dir={run}", "run.steps=2", "checkpoint.every=0"]
        overrides = (*(() if any(o.startswith("eval.") for o in overrides) else ("eval.every=0",)), *overrides)
        assert main(load_config(config, [*short, *overrides])) == 0
        taken = [row for row in rows(run) if row["step"] > 0]
        for row in taken:
            assert row.keys() >= ALIVE
            undefined = {name for name, value in row.items() if value is None}
            assert not {name for name in undefined if not name.startswith("eval/")}
        return taken

    return _train


def reward(name: str) -> str:
    """The override that makes `name` the only reward."""
    return f"reward.terms.main={json.dumps({'name': name, **REQUIRED.get(name, {})})}"


def provider(options: dict[str, Any] | None) -> list[str]:
    """The override that names a provider, if there is one."""
    return [f"reward.providers.own={json.dumps(options)}"] if options else []


@pytest.fixture
def scored(monkeypatch) -> list[tuple[frozenset[str], str]]:
    """(statistics, weights) of every scoring pass."""
    calls = []
    original = Policy.score

    def score(self, rows, want, weights="policy", **options):
        calls.append((want, weights))
        return original(self, rows, want, weights, **options)

    monkeypatch.setattr(Policy, "score", score)
    return calls


@pytest.mark.parametrize("name", available())
def test_every_reward_trains_with_the_scoring_passes_it_needs(train, scored, name):
    taken = train(reward(name), *provider(PROVIDERS.get(name)))
    needed = get_reward(name).needs & {"logp", "entropy", "self_certainty", "top2_gap", "lse"}
    assert scored == ([(needed, "policy")] * 2 if needed else [])
    for row in taken:
        assert row["term/main"] == pytest.approx(row["reward/proxy"])


@pytest.mark.parametrize("weights", ["policy", "reference", "ema"])
def test_judge_and_teacher_hold_the_weights_they_are_said_to(train, monkeypatch, weights):
    """What is handed to the engine that is asked are the policy's tensors, the first ones, or their average."""
    handed = []
    original = EmbeddedEngine.update

    def update(self, bucket):
        tensors = {name: tensor.clone() for name, tensor in bucket}
        handed.append((id(self), tensors))
        original(self, tensors.items())

    asked = []
    generate = EmbeddedEngine.generate

    def watched(self, prompts, sampling):
        if prompts and prompts[0].id.endswith("#judge0"):
            asked.append(id(self))
        return generate(self, prompts, sampling)

    monkeypatch.setattr(EmbeddedEngine, "update", update)
    monkeypatch.setattr(EmbeddedEngine, "generate", watched)
    ema = ["optim.ema_decay=0.5"] if weights == "ema" else []
    train(reward("random"), "optim.lr=0.01", *ema)
    plain = [tensors for _, tensors in handed]
    handed.clear()
    terms = f"reward.terms.judged={json.dumps({'name': 'self_verification', 'weight': 0})}"
    train(reward("random"), terms, "optim.lr=0.01", *ema, *provider({**JUDGE, "weights": weights}))
    assert len(set(asked)) == 1
    given = [tensors for engine, tensors in handed if engine == asked[0]]
    start, after_one = plain[0], plain[1]
    name = max(start, key=lambda key: (start[key] - after_one[key]).abs().max())
    if weights == "policy":
        assert [bool(torch.equal(g[name], p[name])) for g, p in zip(given, plain, strict=True)] == [True] * 3
    elif weights == "reference":
        assert len(given) == 1
        assert torch.equal(given[0][name], start[name])
    else:
        assert len(given) == 2
        assert torch.equal(given[0][name], start[name])
        torch.testing.assert_close(given[1][name], (start[name] + after_one[name]) / 2)


@pytest.mark.parametrize("judge", ["policy", "reference", "ema"])
def test_certainty_is_that_of_the_weights_that_judge(train, scored, judge):
    ema = ["optim.ema_decay=0.5"] if judge == "ema" else []
    taken = train(reward("trajectory_entropy"), f"reward.judge={judge}", "optim.lr=0.01", *ema)
    assert scored == [(frozenset({"logp"}), judge)] * 2
    sampled = [-row["policy/sampled_entropy"] * row["response/length"] for row in taken]
    assert taken[0]["reward/proxy"] == pytest.approx(sampled[0], rel=1e-4)
    if judge == "policy":
        assert taken[1]["reward/proxy"] == pytest.approx(sampled[1], rel=1e-4)
    else:
        assert taken[1]["reward/proxy"] != pytest.approx(sampled[1], rel=1e-3)


def test_losses_with_a_ratio_agree_on_the_first_of_several_updates_and_part_after_it(train):
    several = ["algorithm.mini_batch=2", "algorithm.epochs=2", "optim.lr=0.01"]
    plain, *others = (
        train(*several, f"algorithm.loss={json.dumps(loss)}")
        for loss in (
            {"name": "ppo_clip"},
            {"name": "gspo", "clip_low": 0.2, "clip_high": 0.2},
            {"name": "cispo"},
            {"name": "kl_cov", "share": 0.2},
        )
    )
    for other in others:
        assert other[0]["reward/proxy"] == plain[0]["reward/proxy"]
        assert other[0]["train/grad_norm"] != plain[0]["train/grad_norm"]


def test_without_advantage_nothing_is_learned(train):
    taken = train("algorithm.advantage=zero", "optim.lr=0.01")
    assert [row["train/grad_norm"] for row in taken] == [0.0, 0.0]


def test_terms_mix_by_their_weights(train):
    (row, _) = train(
        reward("majority_vote"),
        'reward.terms.short={"name": "length", "target": 0, "sign": -1, "scale": 10, "weight": 0.5}',
    )
    assert row["reward/proxy"] == pytest.approx(row["term/main"] - 0.05 * row["response/length"])


@pytest.mark.parametrize("name", ["majority_vote", "ground_truth"])
def test_labels_are_read_by_audit_evaluation_probes_and_supervised_rewards_alone(config, tmp_path, monkeypatch, name):
    seen = []
    original = LabelStore.get

    def get(self, prompt_id, *, use):
        seen.append((prompt_id.split("/")[0], use))
        return original(self, prompt_id, use=use)

    monkeypatch.setattr(LabelStore, "get", get)
    run = tmp_path / "run"
    assert main(load_config(config, ["run.steps=3", "optim.lr=1e-5", reward(name)])) == 0
    expected = {("train", "audit"), ("held_out", "evaluation:held_out"), ("held_out", "probes")}
    supervised = name == "ground_truth"
    assert set(seen) == expected | ({("train", "reward")} if supervised else set())
    told = json.loads((run / "labels.json").read_text())
    assert told["supervised"] is supervised
    assert told["uses"] == {use: sum(other == use for _, other in seen) for _, use in seen}
    if supervised:
        for row in rows(run)[1:]:
            assert row["reward/proxy"] == row["audit/accuracy"]


def test_strictly_on_policy_the_ratio_is_one_and_no_forward_is_made_for_it(train, scored):
    taken = train(reward("majority_vote"))
    assert not scored
    assert [row["policy/approx_kl"] for row in taken] == [0.0, 0.0]
    assert [row["policy/ratio"] for row in taken] == [1.0, 1.0]


def test_several_updates_on_one_batch_are_off_policy(train, scored, tmp_path):
    taken = train(reward("random"), "algorithm.mini_batch=2", "algorithm.epochs=2", "optim.lr=0.01")
    assert scored == [(frozenset({"logp"}), "policy")] * 2
    assert all(abs(row["policy/approx_kl"]) > 1e-6 for row in taken)
    assert all(row["policy/clip_fraction"] > 0 for row in taken)
    lines = (tmp_path / "run0" / "metrics.jsonl").read_text().splitlines()
    for row in [json.loads(line) for line in lines][1:]:  # two mini-batches, twice
        assert row["time/tflops_per_rank"] == pytest.approx(4 * row["train/tflop"] / row["time/update"])


def test_all_votes_count_and_the_first_are_trained_on(train, monkeypatch):
    trained = []
    original = Policy.update

    def update(self, rows, *rest, **options):
        trained.append(len(rows))
        return original(self, rows, *rest, **options)

    monkeypatch.setattr(Policy, "update", update)
    some = train(reward("majority_vote"), "rollout.n_train=2")
    assert trained == [8, 8]
    every = train(reward("majority_vote"))
    assert trained[2:] == [16, 16]
    for name in ("vote/majority_ratio", "reward/proxy", "response/length"):
        assert some[0][name] == every[0][name]
    assert some[0]["train/grad_norm"] != every[0]["train/grad_norm"]


def test_advantages_losses_and_aggregations_differ_in_the_step_they_take_and_in_nothing_before(train):
    variants = [
        train(),
        train("algorithm.advantage=dr_grpo"),
        train("algorithm.advantage=rloo"),
        train("algorithm.loss.aggregation=sequence_mean"),
        train("algorithm.loss.aggregation=fixed_length"),
        train("algorithm.loss={name: em_ft}"),
        train("algorithm.advantage=reinforce_pp"),
        train("algorithm.advantage=reinforce_pp_baseline"),
        train("algorithm.entropy_scaling=true"),
    ]
    for name in ("reward/proxy", "response/length", "audit/accuracy"):
        assert len({variant[0][name] for variant in variants}) == 1
    assert len({variant[1]["reward/proxy"] for variant in variants}) > 3  # a clipped gradient forgets a mere factor
    assert len({variant[0]["train/grad_norm"] for variant in variants}) == len(variants)


def test_the_divergence_from_the_start_is_zero_at_the_start(train, scored):
    first, second = train("algorithm.kl.coef=0.5", "optim.lr=0.01")
    assert (frozenset({"logp"}), "reference") in scored
    assert first["loss/kl"] == pytest.approx(0.0, abs=1e-6)
    assert second["loss/kl"] > 1e-3


def test_the_divergence_from_the_moving_average_is_smaller_than_that_from_the_start(train, scored):
    ema = train("algorithm.kl.coef=1e-6", "algorithm.kl.reference=ema", "optim.ema_decay=0.5", "optim.lr=0.01")
    assert (frozenset({"logp"}), "ema") in scored
    start = train("algorithm.kl.coef=1e-6", "optim.lr=0.01")
    assert 0 < ema[1]["loss/kl"] < start[1]["loss/kl"]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_divergence_taken_from_the_reward_changes_the_second_step_and_not_the_first(train, scored, estimator):
    tax = ["algorithm.kl.coef=5", "algorithm.kl.place=reward", f"algorithm.kl.estimator={estimator}"]
    without, taxed = train("optim.lr=0.01"), train("optim.lr=0.01", *tax)
    assert taxed[0]["train/grad_norm"] == pytest.approx(without[0]["train/grad_norm"], rel=1e-4)
    assert taxed[1]["reward/proxy"] == pytest.approx(without[1]["reward/proxy"], rel=1e-4)
    assert taxed[1]["train/grad_norm"] != pytest.approx(without[1]["train/grad_norm"], rel=1e-3)


def test_the_rewards_temperature_is_its_own(train):
    certainty = reward("token_entropy")
    cold, as_sampled = train(certainty, "reward.temperature=0.5"), train(certainty)
    for name in ("response/length", "train/entropy"):
        assert cold[0][name] == as_sampled[0][name]
    assert "policy/entropy" not in cold[0]
    assert as_sampled[0]["reward/proxy"] < cold[0]["reward/proxy"] < 0
    assert train(certainty, "reward.temperature=1.0") == as_sampled


def test_the_entropy_of_all_votes_is_told_apart_from_that_of_the_trained_ones(train):
    all_trained, two = train(reward("token_entropy"))[0], train(reward("token_entropy"), "rollout.n_train=2")[0]
    assert all_trained["train/entropy"] == pytest.approx(all_trained["policy/entropy"], rel=1e-4)
    assert two["policy/entropy"] == all_trained["policy/entropy"]
    assert two["train/entropy"] != pytest.approx(two["policy/entropy"], rel=1e-3)


def test_the_rollouts_temperature_moves_sampling_statistics_and_ratio_together(train):
    hot = train("rollout.temperature=1.5")
    assert hot[0]["train/entropy"] > train()[0]["train/entropy"]
    assert hot[0]["policy/sampled_entropy"] == pytest.approx(hot[0]["train/entropy"], rel=0.3)
    assert hot[0]["policy/ratio"] == 1.0


def test_a_masked_vocabulary_and_recomputation_train_alike(train, tmp_path, base):
    assert train("model.vocab=tokenizer") == train()
    recomputed = train("model.recompute=full")
    assert recomputed[1]["train/grad_norm"] == pytest.approx(train()[1]["train/grad_norm"], rel=1e-4)


def test_small_micro_batches_and_unshared_prompts_take_the_same_step(train):
    plain = train()
    for other in (train("parallel.max_tokens_per_microbatch=20"), train("parallel.share_prefix=false")):
        for name in ("reward/proxy", "train/grad_norm", "train/loss"):
            assert [row[name] for row in other] == pytest.approx([row[name] for row in plain], rel=1e-4, abs=1e-6)


def test_one_response_a_prompt_can_be_recorded_though_not_trained_on(config, tmp_path):
    overrides = ["run.rollout_only=true", "rollout.n_votes=1", "run.steps=2", "algorithm.kl.coef=0.1"]
    assert main(load_config(config, overrides)) == 0
    assert len(list((tmp_path / "run/rollouts").iterdir())) == 2


def test_no_steps_at_all_is_an_evaluation_of_the_base_that_can_be_continued(urlvr: Command, config, whole, tmp_path):
    assert urlvr("train", config, "run.steps=0").code == 0
    assert [row["step"] for row in rows(tmp_path / "run")] == [0]
    assert urlvr("train", config).code == 0
    assert rows(tmp_path / "run") == rows(whole)
