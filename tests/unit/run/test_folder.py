"""A run's folder stays readable whatever happens, and belongs to one process at a time."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from megatron_urlvr.exit_codes import ExitCode, UnusableInput
from megatron_urlvr.run import folder as module
from megatron_urlvr.run.folder import RunDir, RunLocked, write_json
from megatron_urlvr.run.provenance import source

HOLD = textwrap.dedent("""
    import sys
    from megatron_urlvr.run.folder import RunDir
    with RunDir(sys.argv[1]).lock():
        print("held", flush=True)
        sys.stdin.read()
""")
TRY = textwrap.dedent("""
    import sys
    from megatron_urlvr.run.folder import RunDir, RunLocked
    try:
        with RunDir(sys.argv[1]).lock():
            print("held")
    except RunLocked as error:
        print(error)
""")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "runs" / "x")
    run.create()
    return run


def start_holder(run: RunDir) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def try_lock(run: RunDir) -> str:
    return subprocess.run(
        [sys.executable, "-c", TRY, str(run.path)], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_files_are_where_the_design_says(run):
    inside = {
        "config.yaml": run.config,
        "provenance.json": run.provenance,
        "status.json": run.status,
        "metrics.jsonl": run.metrics,
        "labels.json": run.labels,
        "tensorboard": run.tensorboard,
        "checkpoints/step_000050": run.checkpoint(50),
        "rollouts/step_000050.jsonl.zst": run.rollouts(50),
        "samples/step_000050.jsonl": run.samples(50),
        "evals/held_out.jsonl": run.evaluations("held_out"),
        "report": run.report,
        "DONE": run.done,
    }
    assert {name: run.path / name for name in inside} == inside


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"step": 3}', b"\xff\xfe"])
def test_a_damaged_status_is_refused_by_its_name(run, content):
    run.create()
    run.status.write_bytes(content)
    with pytest.raises(UnusableInput, match=r"status\.json"):
        run.read_status()


def test_status_is_read_back_as_it_was_written(run):
    assert run.read_status() is None
    run.write_status("failed", 12, exit_code=ExitCode.NON_FINITE, reason="the loss is NaN")
    status = run.read_status()
    assert status is not None
    assert (status.state, status.step, status.exit_code, status.reason) == ("failed", 12, 4, "the loss is NaN")
    assert json.loads(run.status.read_text())["exit_code"] == 4


def test_a_second_process_is_refused_with_the_holder_named(run):
    holder = start_holder(run)
    with (
        pytest.raises(RunLocked, match=rf"is in use by process {holder.pid} on \S+ .*choose another run.dir"),
        run.lock(),
    ):
        pass
    holder.communicate("")
    with run.lock():
        assert f"process {os.getpid()} on" in try_lock(run)
    assert try_lock(run) == "held"


def test_the_lock_ends_with_a_killed_process_even_when_its_child_lives_on(run):
    fork = "import os; child = os.fork(); child and print(child, flush=True)"
    code = HOLD.replace("sys.stdin.read()", f"{fork}\n    sys.stdin.read()")
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    child = int(process.stdout.readline())
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    os.kill(child, 0)  # it is there, with the file open
    assert try_lock(run) == "held"
    process.communicate()  # closes the pipe that the child waits for


def test_one_process_does_not_hold_a_folder_twice(run, tmp_path):
    (tmp_path / "link").symlink_to(run.path)
    with run.lock():
        with pytest.raises(RunLocked, match="by this very process"), RunDir(tmp_path / "link").lock():
            pass
        assert "in use" in try_lock(run)  # the refused attempt did not release the first
    with run.lock():
        pass


def test_a_folder_that_cannot_be_made_is_unusable_input(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UnusableInput, match=r"run\.dir = .* cannot be made a folder"):
        RunDir(tmp_path / "file" / "run").create()


def test_a_failed_write_leaves_the_old_file_and_no_litter(run, monkeypatch):
    write_json(run.status, {"state": "running"})

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_json(run.status, {"state": "done"})
    monkeypatch.undo()
    assert json.loads(run.status.read_text()) == {"state": "running"}
    assert [path.name for path in run.path.iterdir()] == ["status.json"]


def test_json_that_no_reader_takes_is_not_written(run):
    with pytest.raises(ValueError):
        write_json(run.status, {"loss": float("nan")})
    assert not run.status.exists()


def test_done_is_a_marker_that_comes_and_goes(run):
    run.mark_done()
    assert run.done.exists()
    run.clear_done()
    run.clear_done()
    assert not run.done.exists()


def test_provenance_keeps_earlier_launches(run):
    run.write_provenance({"model": "aa"})
    run.write_provenance({"model": "bb"})
    run.write_provenance({"model": "cc"})
    written = json.loads(run.provenance.read_text())
    assert written["hashes"] == {"model": "cc"}
    assert [item["hashes"]["model"] for item in written["earlier"]] == ["aa", "bb"]
    assert "earlier" not in written["earlier"][0]
    assert written["versions"]["torch"]


def test_provenance_names_commit_and_uncommitted_changes(tmp_path):
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], capture_output=True, text=True)
        return done.stdout.strip()

    assert source(tmp_path) == {}
    git("init")
    (tmp_path / "code.py").write_text("a = 1\n")
    git("add", ".")
    git("commit", "-m", "first")
    clean = source(tmp_path)
    assert clean == {"commit": git("rev-parse", "HEAD"), "dirty": False, "untracked": []}
    (tmp_path / "code.py").write_text("a = 2\n")
    (tmp_path / "new.py").touch()
    dirty = source(tmp_path)
    assert dirty["dirty"]
    assert dirty["untracked"] == ["new.py"]
    assert "+a = 2" in dirty["diff"]
    assert len(dirty["diff_sha256"]) == 64
