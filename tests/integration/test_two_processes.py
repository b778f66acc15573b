"""A run of two replicas ends as one: what meets one rank, all leave with, and what is saved is whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import at_step, checkpoints, rows, send, status

from megatron_urlvr.config.loader import load_config

ON_RANK_1 = """
import os, signal, sys
from megatron_urlvr import cli, train

original, wanted = train.Trainer.observe, int(sys.argv[1])
def observe(self, groups, results, step):
    if step == wanted and os.environ["RANK"] == "1":
        {act}
    return original(self, groups, results, step)
train.Trainer.observe = observe
sys.argv = ["urlvr", *sys.argv[2:]]
cli.main()
"""


@pytest.fixture
def torchrun(tmp_path: Path):
    """`torchrun(act, step, "train", ...)`: two processes, of which the second does `act` in `step`. What they wrote."""

    def _torchrun(act: str, step: int, *arguments: object) -> str:
        program = tmp_path / "program.py"
        program.write_text(ON_RANK_1.format(act=act))
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command = [*launcher, str(program), str(step), *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        return done.stdout + done.stderr

    return _torchrun


def test_a_run_goes_on_at_any_layout_and_a_signal_to_one_rank_saves_all(
    torchrun, urlvr, config, whole, tmp_path, monkeypatch
):
    """One process, then two replicas until a signal reaches one of them, then one again, cut otherwise."""
    run = tmp_path / "run"
    with at_step(monkeypatch, 3, send(signal.SIGTERM)):
        assert urlvr("train", config, "checkpoint.every=0").code == 75
    written = torchrun("os.kill(os.getpid(), signal.SIGTERM)", 4, "train", config, "checkpoint.every=0")
    assert "resumed after step 2" in written
    assert "exitcode  : 75" in written
    assert "preempted: a signal on another rank; saved after step 3" in written
    assert (status(run)["state"], status(run)["step"]) == ("preempted", 3)
    assert checkpoints(run) == ["step_000002", "step_000003"]

    cut = ["parallel.dp=1", "parallel.max_tokens_per_microbatch=64", "model.recompute=full", "rollout.batch=4"]
    outcome = urlvr("train", config, "checkpoint.every=0", *cut)
    assert "resumed after step 3" in outcome.out
    assert (outcome.code, status(run)["state"]) == (0, "done")
    changes = [
        "model.recompute: none -> full",
        "parallel.dp: auto -> 1",
        "parallel.max_tokens_per_microbatch: 8192 -> 64",
    ]
    assert f"it goes on with other settings: {'; '.join(changes)}; rollout.batch: 4096 -> 4" in outcome.out
    assert json.loads((run / "provenance.json").read_text())["changed"][:3] == changes
    assert load_config(run / "config.yaml").parallel.max_tokens_per_microbatch == 64

    for mine, one in zip(rows(run), rows(whole), strict=True):
        balance = {name: mine.pop(name) for name in list(mine) if name.startswith("balance/")}
        assert mine == pytest.approx(one, rel=1e-3, abs=1e-5)
        assert balance.get("balance/after", 1.0) <= balance.get("balance/before", 1.0)
    told = json.loads((run / "labels.json").read_text())["uses"]
    expected = json.loads((whole / "labels.json").read_text())["uses"]
    # Every replica looks at all the probes: of the evaluations at steps 0, 3 and 6 the second was two replicas'.
    assert told == {**expected, "probes": expected["probes"] // 3 * 4}


def test_a_bug_on_one_rank_ends_both_and_is_told_in_its_own_words(torchrun, config, tmp_path):
    written = torchrun("1 / 0", 2, "train", config)
    assert "ZeroDivisionError" in written
    assert (status(tmp_path / "run")["state"], status(tmp_path / "run")["exit_code"]) == ("failed", 1)
    assert status(tmp_path / "run")["reason"] == "rank 1: ZeroDivisionError: division by zero"


def test_unusable_input_is_said_once(torchrun, config):
    written = torchrun("pass", 0, "train", config, "data.train.size=2")
    assert written.count("data.train holds 2 prompts, but rollout.prompts = 4") == 1
    assert "exitcode  : 2" in written
