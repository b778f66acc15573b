"""`urlvr theory` prints what it computed, and keeps it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_urlvr.cli import app
from megatron_urlvr.exit_codes import UnusableInput


def test_theory_stands_beside_its_closed_forms(tmp_path: Path):
    result = CliRunner().invoke(
        app, ["theory", "--policy", "0.3,0.25,0.25,0.2", "--out", str(tmp_path), "--steps", "8"]
    )
    assert result.exit_code == 0
    assert "fixed reference stays at                   0.538" in result.output
    kept = json.loads((tmp_path / "theory.json").read_text())
    assert kept["largest_difference"] < 1e-12
    assert abs(sum(kept["sampled"]["winner_probabilities"]) - 1) < 1e-12
    assert (tmp_path / "theory.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("given", ["a,b", "1", "0.5,0"])
def test_what_is_no_policy_is_told_in_a_sentence(given: str):
    result = CliRunner().invoke(app, ["theory", "--policy", given])
    assert isinstance(result.exception, UnusableInput)
    assert "--policy" in str(result.exception)
