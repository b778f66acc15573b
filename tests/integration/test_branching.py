"""A run that goes on from another one's checkpoint."""

from __future__ import annotations

from pathlib import Path

from small_runs import Command, assert_same_run, checkpoints, rows, status


def test_a_branch_has_its_parents_history_and_its_own_future(urlvr: Command, config: Path, tmp_path: Path) -> None:
    assert urlvr("train", config).code == 0
    parent, child = tmp_path / "run", tmp_path / "child"
    settings = (f"run.branch_from={parent}@4", f"run.dir={child}", "reward.terms.main.name=majority_vote")
    outcome = urlvr("train", config, *settings)
    assert outcome.code == 0, outcome.err
    assert f"branched off {parent} after step 4" in outcome.out
    assert rows(child)[:5] == rows(parent)[:5]
    assert len(rows(child)) == 7
    # step 5 meets the same rollouts, since the weights are the parent's, and rewards them otherwise
    assert rows(child)[5]["audit/accuracy"] == rows(parent)[5]["audit/accuracy"]
    assert rows(child)[5]["reward/proxy"] != rows(parent)[5]["reward/proxy"]
    assert rows(child)[6] != rows(parent)[6]
    assert checkpoints(child)[-1] == "step_000006"
    assert urlvr("train", config, *settings).out.count("is done") == 1


def test_a_branch_with_the_parents_own_settings_is_the_parent(urlvr: Command, config: Path, tmp_path: Path) -> None:
    assert urlvr("train", config).code == 0
    parent, child = tmp_path / "run", tmp_path / "child"
    outcome = urlvr("train", config, f"run.branch_from={parent}@4", f"run.dir={child}")
    assert outcome.code == 0, outcome.err
    for path in (parent / "samples").iterdir():  # probes are not copied
        if not (child / "samples" / path.name).exists():
            path.unlink()
    assert_same_run(child, parent, step=6)


def test_what_cannot_be_branched_from_is_told(urlvr: Command, config: Path, tmp_path: Path) -> None:
    outcome = urlvr("train", config, f"run.branch_from={tmp_path}/none@3")
    assert outcome.code == 2
    assert "none has no checkpoint after step 3. It has none" in outcome.err.replace(str(tmp_path) + "/", "")
    outcome = urlvr("train", config, "run.branch_from=somewhere")
    assert outcome.code == 2
    assert "run.branch_from" in outcome.err
    assert urlvr("train", config, "run.steps=2").code == 0
    parent = tmp_path / "run"
    outcome = urlvr("train", config, f"run.branch_from={parent}@2", f"run.dir={tmp_path / 'child'}", "run.seed=5")
    assert outcome.code == 2  # the place in the data is another seed's
    assert status(parent)["state"] == "done"
