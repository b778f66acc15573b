"""The summary of a study against its evaluations, read by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from synthetic_runs import make_run

from megatron_urlvr.analysis.runs import Series, load_run
from megatron_urlvr.analysis.summary import mean_interval, summarise_run, write_summary


def with_majorities(folder: Path, share: float) -> Path:
    path = folder / "evals/held_out.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    count = len(lines[0]["correct"])
    lines[0]["majority_right"] = [1.0 if k < share * count else 0.0 for k in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_problems_are_told_apart_by_what_the_base_believed(tmp_path: Path):
    folder = with_majorities(make_run(tmp_path / "run", "dies"), 0.25)
    found = summarise_run(load_run(folder), "held_out")
    assert found is not None
    rows = [json.loads(line) for line in (folder / "evals/held_out.jsonl").read_text().splitlines()]
    table = np.array([row["correct"] for row in rows]) / 4
    peak = int(np.argmax(table.mean(axis=1)))
    assert found.peak_step == rows[peak]["step"]
    assert found.label_right is not None
    assert found.label_wrong is not None
    assert (found.label_right.problems, found.label_wrong.problems) == (16, 48)
    assert found.label_right.peak == pytest.approx(table[peak, :16].mean())
    assert found.label_wrong.end == pytest.approx(table[-1, 16:].mean())
    assert found.all.start == pytest.approx(table[0].mean())


def test_a_run_without_recorded_majorities_has_no_parts(tmp_path: Path):
    found = summarise_run(load_run(make_run(tmp_path / "run")), "held_out")
    assert found is not None
    assert (found.label_right, found.label_wrong) == (None, None)
    assert summarise_run(load_run(tmp_path / "run"), "elsewhere") is None


def test_the_interval_over_seeds_is_students():
    mean, low, high = mean_interval([0.1, 0.2, 0.4])
    half = 4.303 * np.std([0.1, 0.2, 0.4], ddof=1) / 3**0.5
    assert (mean, low, high) == pytest.approx((0.7 / 3, 0.7 / 3 - half, 0.7 / 3 + half))
    assert mean_interval([0.3]) is None


@pytest.mark.parametrize(("seeds", "quantile"), [(16, 2.131), (17, 2.120), (21, 2.086), (31, 2.042), (101, 1.984)])
def test_the_interval_is_students_over_however_many_seeds(seeds, quantile):
    values = np.random.default_rng(0).random(seeds)
    mean, _, high = mean_interval(values.tolist())
    assert (high - mean) / (values.std(ddof=1) / seeds**0.5) == pytest.approx(quantile, abs=5e-4)


def test_a_studys_summary_has_a_row_a_series(tmp_path: Path):
    runs = [load_run(with_majorities(make_run(tmp_path / f"s{k}", "dies", seed=k), 0.5)) for k in range(3)]
    page = write_summary([Series("entropy", runs)], tmp_path / "report", measure="held_out", select=None)
    assert page is not None
    text = page.read_text()
    assert "| entropy | 3 |" in text
    assert "rose in 3 of 3" in text
    assert "2 rose and collapsed; 1 collapsed" in text
    kept = json.loads((tmp_path / "report/summary.json").read_text())
    assert len(kept[0]["runs"]) == 3
    assert kept[0]["over_seeds"]["label_right"]["start"][0] == pytest.approx(
        np.mean([run["label_right"]["start"] for run in kept[0]["runs"]])
    )
    assert write_summary([], tmp_path / "none", measure=None, select=None) is None
