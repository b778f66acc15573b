"""Off-policy corrections in whole runs: on an engine that agrees they change nothing, on stale rollouts they do."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_runs import Command, rows

SHORT = ("eval.every=0", "run.steps=3", "checkpoint.every=0")


def last(run: Path) -> dict[str, float]:
    return rows(run)[-1]


@pytest.mark.parametrize("setting", ["method=truncate", "method=mask", "method=reject", "old_logp=rollout"])
def test_where_the_engine_agrees_a_correction_changes_nothing(
    urlvr: Command, config: Path, tmp_path: Path, setting: str
) -> None:
    assert urlvr("train", config, *SHORT, f"run.dir={tmp_path}/plain").code == 0
    assert urlvr("train", config, *SHORT, f"algorithm.correction.{setting}").code == 0
    plain, corrected = last(tmp_path / "plain"), last(tmp_path / "run")
    for name in ("train/loss", "train/grad_norm", "reward/proxy"):
        assert corrected[name] == pytest.approx(plain[name], rel=1e-3, abs=1e-5)
    assert corrected["mismatch/logp_max_diff"] < 1e-4
    assert corrected["mismatch/ess"] == pytest.approx(1, abs=1e-6)
    if "method" in setting:
        assert corrected["correction/weight"] == pytest.approx(1, abs=1e-4)
        assert corrected["correction/zero"] == 0


def test_stale_rollouts_raise_the_alarm_and_are_weighed(urlvr: Command, config: Path, tmp_path: Path) -> None:
    assert urlvr("train", config, *SHORT, f"run.dir={tmp_path}/old", "run.rollout_only=true").code == 0
    replay = ("rollout.engine=replay", f"rollout.replay_from={tmp_path}/old", "optim.lr=0.03")
    outcome = urlvr(
        "train", config, *SHORT, *replay, "algorithm.correction={method: truncate, high: 1.0, alarm: 1.0e-3}"
    )
    assert outcome.code == 0
    fresh, *_, stale = rows(tmp_path / "run")[1:]
    assert fresh["mismatch/alarm"] == 0
    assert stale["mismatch/alarm"] == 1
    assert stale["mismatch/logp_abs_diff"] > 1e-2
    assert stale["mismatch/ess"] < 1
    assert stale["mismatch/reward_abs_diff"] > 1e-2, "the reward is made of the log-probs that are off"
    assert 0 < stale["correction/capped"] < 1
    assert stale["correction/weight"] < 1
    assert outcome.err.count("mismatch/alarm") == 1, "said once, while it lasts"


def test_dynamic_sampling_trains_on_what_the_filter_keeps(urlvr: Command, config: Path, tmp_path: Path) -> None:
    vote = 'reward.terms.main={"name": "majority_vote"}'
    sampling = ["rollout.filter.name=zero_variance", "rollout.oversample=3", "rollout.n_votes=6", "rollout.n_train=4"]
    assert urlvr("train", config, *SHORT, vote, *sampling, "rollout.train_on=stratified").code == 0
    for row in rows(tmp_path / "run")[1:]:
        shares = [row[f"filter/{name}"] for name in ("kept", "spare")] + [row.get("filter/dropped/zero_variance", 0)]
        assert sum(shares) == pytest.approx(1)
        assert row["filter/kept"] + row["filter/filled"] == pytest.approx(4 / 12)
        assert row["reward/zero_variance"] == pytest.approx(row.get("filter/dropped/zero_variance", 0))
