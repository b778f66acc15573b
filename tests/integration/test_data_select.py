"""Prompts chosen by what the base votes, and trained on from the file."""

from __future__ import annotations

import json
from pathlib import Path

from small_runs import TASK, Command, rows

READ = "id_field: id, grading: {extract: hash, equivalence: exact}"


def test_prompts_are_kept_by_their_votes_and_can_be_trained_on(urlvr: Command, config: Path, tmp_path: Path) -> None:
    found = {}
    for keep in ("majority_wrong", "majority_right"):
        out = tmp_path / f"{keep}.jsonl"
        outcome = urlvr("data", "select", config, "--keep", keep, "--votes", "8", "--out", out)
        assert outcome.code == 0, outcome.err
        found[keep] = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(found["majority_wrong"]) + len(found["majority_right"]) == 64
    assert not {row["id"] for row in found["majority_wrong"]} & {row["id"] for row in found["majority_right"]}
    assert all(row["maj"] < 0.5 for row in found["majority_wrong"])
    for row in found["majority_right"]:  # labels are the truth
        assert row["answer"] == str(sum(map(int, row["prompt"].rstrip("="))) % 10)
        assert row["avg"] > 0

    source = f"data.train={{path: {tmp_path}/majority_wrong.jsonl, {READ}}}"
    outcome = urlvr("train", config, source, "run.steps=2", f"run.dir={tmp_path / 'on_wrong'}", "eval.every=0")
    assert outcome.code == 0, outcome.err
    assert rows(tmp_path / "on_wrong")[-1]["audit/no_label"] == 0
    assert "accuracy" in " ".join(rows(tmp_path / "on_wrong")[-1])


def test_what_cannot_be_selected_is_told(urlvr: Command, config: Path, tmp_path: Path) -> None:
    outcome = urlvr("data", "select", config, "--keep", "majority_worng")
    assert outcome.code == 2
    assert "Did you mean majority_wrong?" in outcome.err
    small = f"data.train={{task: chain_sum, size: 4, settings: {json.dumps(TASK['settings'])}}}"
    outcome = urlvr(
        "data", "select", config, small, "--keep", "mixed", "--votes", "1", "--out", tmp_path / "none.jsonl"
    )
    assert outcome.code == 2
    assert "none of 4 prompts is left (some samples are right and some wrong)" in outcome.err
