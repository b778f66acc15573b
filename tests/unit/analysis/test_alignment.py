"""Confidence against correctness, and paired comparisons, against counting by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_urlvr.analysis.alignment import alignment, expected_calibration_error
from megatron_urlvr.analysis.paired import compare, read_table
from megatron_urlvr.commands.compare import print_comparison
from megatron_urlvr.exit_codes import UnusableInput


def rows_of(scores: list[list[float]], right: list[list[bool]]) -> list[dict]:
    return [
        {"rewards": {"sure": s}, "order": {"sure": s}, "counts": {"sure": {}}, "right": r}
        for s, r in zip(scores, right, strict=True)
    ]


def test_alignment_is_within_problems_and_leaves_out_those_without_a_pair():
    scores = [[0.9, 0.1], [0.2, 0.8], [0.5, 0.5], [0.9, 0.9]]
    right = [[True, False], [True, False], [True, False], [True, True]]
    found = alignment(rows_of(scores, right), "sure", calibrated=True)
    assert found["auroc"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert found["aligned"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert found["left_out"] == 0.25
    assert "ece" in found
    nothing = alignment(rows_of([[1.0]], [[True]]), "sure", calibrated=False)
    assert nothing == {"left_out": 1.0}


def test_calibration_error_is_the_weighted_gap_of_the_bins():
    rng = np.random.default_rng(0)
    confidence, right = rng.random(500), rng.random(500) < 0.5
    expected = 0.0
    for b in range(10):
        inside = (confidence >= b / 10) & ((confidence < (b + 1) / 10) | (b == 9))
        expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert expected_calibration_error(confidence, right) == pytest.approx(expected)
    assert expected_calibration_error([1.0, 0.0], [True, False]) == 0
    with pytest.raises(ValueError, match=r"must lie in 0..1"):
        expected_calibration_error([1.5], [True])


def table(path: Path, averages: list[float], ids: str = "abcdefghij", **more: object) -> Path:
    rows = [{"id": name, "avg": value, "maj": float(value > 0.5), "greedy": None, **more}
            for name, value in zip(ids, averages, strict=True)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_paired_difference_is_surer_than_its_two_means(tmp_path: Path):
    base = np.linspace(0, 0.9, 10)
    one, other = table(tmp_path / "one", list(base)), table(tmp_path / "other", list(base + 0.05))
    average, majority = compare(read_table(one), read_table(other))
    assert average.difference == pytest.approx(0.05)
    assert (average.low, average.high) == (pytest.approx(0.05), pytest.approx(0.05))  # though problems differ widely
    assert (average.better, average.worse, average.problems) == (10, 0, 10)
    assert majority.measure == "maj"  # greedy, which is not there, is left out


def test_tables_of_other_problems_or_no_tables_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    one = table(tmp_path / "one", [0.5] * 10)
    other = table(tmp_path / "other", [0.5] * 10, ids="bcdefghijk")
    with pytest.raises(UnusableInput, match="2 are in one of them only, such as a"):
        print_comparison(one, other)
    with pytest.raises(UnusableInput, match="there is no file"):
        read_table(tmp_path / "none")
    (tmp_path / "broken").write_text("[]\n")
    with pytest.raises(UnusableInput, match="line 1 is no problem"):
        read_table(tmp_path / "broken")
    (tmp_path / "undefined").write_text('{"id": "a", "avg": NaN}\n')
    with pytest.raises(UnusableInput, match="line 1 is no problem"):
        read_table(tmp_path / "undefined")
    with pytest.raises(UnusableInput, match="no measure in common"):
        compare({"a": {"avg": 0.5, "maj": None}}, {"a": {"maj": 0.5}})
    print_comparison(one, one)
    assert "+0.0000" in capsys.readouterr().out
