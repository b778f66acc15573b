"""The account of a detector on runs whose outcome is known, and the exact interval against tables."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from synthetic_runs import make_run

from megatron_urlvr.analysis.detection import (
    Detection,
    account,
    detect,
    detector_rule,
    exact_interval,
    fixed_step,
    threshold,
)
from megatron_urlvr.analysis.runs import load_run
from megatron_urlvr.commands.collapse import print_detections
from megatron_urlvr.config.monitor import CollapseSection
from megatron_urlvr.exit_codes import UnusableInput


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for seed in range(3):
        make_run(tmp_path / f"dies{seed}", "dies", seed=seed)
        make_run(tmp_path / f"rises{seed}", "rises", seed=seed)
    return tmp_path


def test_dying_runs_are_caught_and_rising_ones_left_alone(runs: Path):
    settings = CollapseSection()
    found = [detect(load_run(path), detector_rule(settings), settings) for path in sorted(runs.iterdir())]
    result = account(found)
    assert (result.healthy, result.false_alarms, result.collapsing, result.detected) == (3, 0, 3, 3)
    assert result.false_alarm_interval == (0.0, pytest.approx(1 - 0.025 ** (1 / 3)))
    dying = found[0]
    assert dying.verdict is not None
    assert dying.verdict.onset is not None
    assert dying.stop == dying.verdict.onset - 2
    assert "the chance that two prompts get the same answer" in dying.verdict.reasons[0]
    assert dying.best is not None
    assert dying.kept is not None
    assert dying.loss == dying.best - dying.kept


def test_losses_and_kept_shares_are_those_of_falling_runs_and_shares_need_a_gain():
    def run(start, best, kept, collapsing=True, stop=7):
        return Detection("run", stop, None, start, best, kept, end=0.0, collapsing=collapsing)

    found = [run(0.3, 0.5, 0.45), run(0.3, 0.5, 0.2), run(0.3, 0.34, 0.3), run(0.3, 0.9, 0.9, collapsing=False)]
    assert [each.loss for each in found[:3]] == pytest.approx([0.05, 0.3, 0.04])
    assert [each.kept_share for each in found[:2]] == pytest.approx([0.75, -0.5])
    assert found[2].kept_share is None  # .04 is no gain to keep
    result = account(found)
    assert (result.collapsing, result.with_gain, result.healthy, result.false_alarms) == (3, 2, 1, 1)
    assert result.median_loss == pytest.approx(0.05)
    assert result.median_kept_share == pytest.approx(0.125)
    missed = account([run(0.3, 0.5, 0.0, stop=None)])
    assert (missed.detected, missed.median_loss, missed.median_kept_share) == (0, 0.5, pytest.approx(-1.5))


def test_plain_rules_stop_where_they_say(runs: Path):
    rows = load_run(runs / "dies0").rows
    assert fixed_step(30)(rows) == 30
    assert fixed_step(100)(rows) is None  # that is the end anyway
    below = [
        row["step"]
        for row in rows
        if row.get("policy/sampled_entropy") is not None and row["policy/sampled_entropy"] <= 0.3
    ]
    assert threshold("policy/sampled_entropy", 0.3, below=True)(rows) == below[0] - 1
    assert threshold("vote/majority_ratio", 2.0, below=False)(rows) is None


def test_a_run_without_evaluations_has_a_verdict_and_no_account(tmp_path: Path):
    folder = make_run(tmp_path / "blind", "dies", sets=())
    found = detect(load_run(folder), detector_rule(CollapseSection()), CollapseSection())
    assert found.verdict is not None
    assert found.verdict.alarm is not None
    assert (found.best, found.loss, found.kept_share, found.collapsing) == (None, None, None, None)


@pytest.mark.parametrize(("k", "n"), [(0, 10), (1, 10), (3, 20), (20, 20), (0, 0)])
def test_the_exact_interval_has_its_tails(k, n):
    low, high = exact_interval(k, n)
    at_least = math.fsum(math.comb(n, i) * low**i * (1 - low) ** (n - i) for i in range(k, n + 1))
    at_most = math.fsum(math.comb(n, i) * high**i * (1 - high) ** (n - i) for i in range(k + 1))
    assert low == 0.0 if k == 0 else at_least == pytest.approx(0.025)
    assert high == 1.0 if k == n else at_most == pytest.approx(0.025)


def test_the_command_prints_verdicts_and_keeps_them_as_json(runs: Path, capsys: pytest.CaptureFixture[str]):
    out = runs.parent / "detections.json"
    print_detections([runs], settings=CollapseSection(), step=20, entropy=0.4, majority=0.9, out=out)
    text = capsys.readouterr().out
    assert text.count("collapse since step") == 3
    assert "0 / 3 [0.00, 0.71]" in text
    kept = json.loads(out.read_text())
    assert set(kept["rules"]) == {"detector", "step 20", "entropy <= 0.4", "majority >= 0.9"}
    assert kept["rules"]["detector"]["account"]["detected"] == 3
    with pytest.raises(UnusableInput, match="no runs there"):
        print_detections([out.parent / "none"], settings=CollapseSection(), step=1, entropy=0, majority=1, out=None)
