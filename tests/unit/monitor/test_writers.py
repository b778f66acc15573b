"""Writers: what a run logs is what its files hold, through resumes, undefined values and other ranks."""

import io
import json
import math
import sys
import types

import numpy as np
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_urlvr.config.monitor import MonitorSection
from megatron_urlvr.monitor.console import PlainProgress, TerminalProgress
from megatron_urlvr.monitor.writers import MissingPackageError, Writers, build_writers

CONFIG = {"run": {"name": "tiny", "steps": 4}, "optim": {"lr": 0.1}}
QUIET = MonitorSection(tensorboard=False)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def scalars(folder, name):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_one_object_a_step_with_exact_floats_is_on_disk_after_each_log(tmp_path):
    writers = build_writers(tmp_path, QUIET, config=CONFIG, console=False)
    value = 0.1 + 0.2
    for step in range(3):
        writers.log(step, {"reward/proxy": value * step, "policy/entropy": np.float32(0.5)})
        assert rows(tmp_path)[-1] == {"step": step, "reward/proxy": value * step, "policy/entropy": 0.5}
    assert len(rows(tmp_path)) == 3
    writers.close()


def test_the_file_is_the_same_whatever_the_order_of_the_metrics(tmp_path):
    for name, metrics in {"a": {"x": 1.0, "y": 2.0}, "b": {"y": 2.0, "x": 1.0}}.items():
        writers = build_writers(tmp_path / name, QUIET, config=CONFIG, console=False)
        writers.log(0, metrics)
        writers.close()
    assert (tmp_path / "a/metrics.jsonl").read_bytes() == (tmp_path / "b/metrics.jsonl").read_bytes()


def test_an_undefined_value_is_null_in_json_and_a_gap_in_tensorboard(tmp_path):
    writers = build_writers(tmp_path, MonitorSection(), config=CONFIG, console=False)
    writers.log(0, {"eval/held_out/accuracy_given_parsed": 0.5, "x": math.inf})
    writers.log(1, {"eval/held_out/accuracy_given_parsed": math.nan, "x": 1.0})
    writers.close()
    assert [row["eval/held_out/accuracy_given_parsed"] for row in rows(tmp_path)] == [0.5, None]
    assert rows(tmp_path)[0]["x"] is None
    assert scalars(tmp_path, "eval/held_out/accuracy_given_parsed") == [(0, 0.5)]


@pytest.mark.parametrize("value", ["0.5", None, [1.0]])
def test_a_value_that_is_no_number_is_refused_by_name(tmp_path, value):
    writers = build_writers(tmp_path, QUIET, config=CONFIG, console=False)
    with pytest.raises(TypeError, match="'reward/proxy'"):
        writers.log(0, {"reward/proxy": value})
    writers.close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_step_logged_twice_is_refused(tmp_path):
    writers = build_writers(tmp_path, QUIET, config=CONFIG, console=False)
    writers.log(3, {"x": 1.0})
    with pytest.raises(ValueError, match="step 3"):
        writers.log(3, {"x": 1.0})
    writers.close()


def test_a_resumed_run_appends_to_the_file_and_purges_the_void_steps_of_tensorboard(tmp_path):
    first = build_writers(tmp_path, MonitorSection(), config=CONFIG, console=False)
    for step in range(5):
        first.log(step, {"x": 10.0 + step})
    first.close()
    resumed = build_writers(tmp_path, MonitorSection(), config=CONFIG, console=False)
    for step in (3, 4):
        resumed.log(step, {"x": 20.0 + step})
    resumed.close()
    assert scalars(tmp_path, "x") == [(0, 10.0), (1, 11.0), (2, 12.0), (3, 23.0), (4, 24.0)]
    assert len(rows(tmp_path)) == 7  # the loop truncates before it resumes; the writer only appends


def test_other_ranks_write_nothing_at_all(tmp_path):
    writers = build_writers(tmp_path, MonitorSection(wandb=True), config=CONFIG, console=True, rank=1)
    writers.log(0, {"x": 1.0})
    writers.close()
    assert list(tmp_path.iterdir()) == []


def test_wandb_without_the_package_is_a_sentence_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingPackageError, match=r"monitor\.wandb is true.*pip install.*monitor\.wandb=false"):
        build_writers(tmp_path, MonitorSection(wandb=True), config=CONFIG, console=False)
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_continues_its_wandb_run_under_the_same_id(tmp_path, monkeypatch):
    fake, calls, logged = types.ModuleType("wandb"), [], []

    def init(**kwargs):
        calls.append(kwargs)
        return types.SimpleNamespace(
            log=lambda metrics, step: logged.append((step, metrics)), finish=lambda: logged.append("finished")
        )

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for step in (0, 1):
        writers = build_writers(tmp_path, MonitorSection(wandb=True, tensorboard=False), config=CONFIG, console=False)
        writers.log(step, {"x": 1.0, "undefined": math.nan})
        writers.close()
    assert calls[0]["id"] == calls[1]["id"]
    assert len(calls[0]["id"]) >= 8
    assert calls[1]["resume"] == "allow"
    assert calls[0]["config"] == CONFIG
    assert logged == [(0, {"x": 1.0}), "finished", (1, {"x": 1.0}), "finished"]


def test_one_writer_failing_to_close_does_not_keep_the_others_open():
    closed = []

    class Writer:
        def __init__(self, name):
            self.name = name

        def log(self, step, metrics): ...

        def close(self):
            closed.append(self.name)
            if self.name == "b":
                raise OSError("no space left")

    writers = Writers([Writer("a"), Writer("b"), Writer("c")])
    with pytest.raises(OSError, match="no space"):
        writers.close()
    assert sorted(closed) == ["a", "b", "c"]


def test_plain_lines_come_every_few_seconds_and_never_miss_the_last_step():
    now, out = [0.0], io.StringIO()
    progress = PlainProgress("tiny", 9, out, interval_s=5.0, clock=lambda: now[0])
    progress.log(0, {"eval/held_out/avg@4": 0.25, "eval/held_out/avg@4_se": 0.01})
    for step in range(1, 10):
        now[0] += 2.0
        progress.log(step, {"reward/proxy": -step / 10, "policy/entropy": 0.5, "time/step": 0.125})
    progress.close()
    lines = out.getvalue().splitlines()
    assert [line.split()[2] for line in lines] == ["0/9", "3/9", "6/9", "9/9"]
    assert lines[-1].split() == [
        "tiny",
        "step",
        "9/9",
        "proxy",
        "-0.9",
        "accuracy",
        "0.250",
        "entropy",
        "0.500",
        "s/step",
        "0.12",
    ]


def test_the_terminal_bar_shows_step_and_headline_metrics():
    console = Console(file=io.StringIO(), force_terminal=True, width=160)
    progress = TerminalProgress("tiny", 4, console)
    progress.log(3, {"reward/proxy": -1.5, "audit/accuracy": 0.5})
    progress.close()
    shown = console.file.getvalue()
    assert "3/4" in shown
    assert "proxy -1.5" in shown
