"""Live progress of several jobs, read from files that grow."""

import io
import json

from rich.console import Console

from megatron_urlvr.analysis.progress import PlainWatcher, Tail, TerminalWatcher
from megatron_urlvr.analysis.scheduler import Job, Outcome


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_tail_follows_a_file_that_is_not_there_yet_grows_by_half_lines_and_is_cut_by_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    tail.read()
    assert tail.step == 0
    text = lines({"step": 1, "reward/proxy": -2.0}, {"step": 2, "reward/proxy": -1.0})
    path.write_text(text[:-5])
    tail.read()
    assert (tail.step, str(tail.headlines)) == (1, "proxy -2")
    path.write_text(text)
    tail.read()
    assert (tail.step, str(tail.headlines)) == (2, "proxy -1")
    path.write_text(lines({"step": 1, "reward/proxy": -3.0}))
    tail.read()
    assert (tail.step, str(tail.headlines)) == (1, "proxy -3")


def jobs(tmp_path):
    (tmp_path / "base.log").write_text("pretraining step 100: loss 1.2\n\n")
    (tmp_path / "metrics.jsonl").write_text(lines({"step": 3, "eval/held_out/avg@4": 0.25}))
    base = Job("pretrain/base", ("x",), tmp_path / "base.log")
    return base, Job("weak", ("x",), tmp_path / "weak.log", steps=9, metrics=tmp_path / "metrics.jsonl")


def test_warnings_and_bars_of_a_log_are_no_progress(tmp_path):
    base, _ = jobs(tmp_path)
    with base.log.open("a") as log:
        log.write("x.py:3: UserWarning: old\n  return func(*args, **kwargs)\nWriting model shards: 100%|###| 1/1\r")
    now, written = [0.0], []
    watcher = PlainWatcher(written.append, interval_s=10, clock=lambda: now[0])
    for more in ("", "$ urlvr pretrain again\n  return func(*args, **kwargs)\n"):
        now[0] += 10
        with base.log.open("a") as log:
            log.write(more)
        watcher.tick([base])
    assert written == ["pretrain/base  pretraining step 100: loss 1.2", "pretrain/base runs"]


def test_plain_lines_tell_starts_ends_and_now_and_then_where_each_job_stands(tmp_path):
    now, written = [0.0], []
    base, run = jobs(tmp_path)
    with PlainWatcher(written.append, interval_s=10, clock=lambda: now[0]) as watcher:
        watcher.started(base)
        watcher.started(run)
        watcher.tick([base, run])
        now[0] = 10.0
        watcher.tick([base, run])
        watcher.ended(base, Outcome("done", 0, seconds=12.4))
        watcher.ended(run, Outcome("failed", 4, "exit code 4: NaN", 1.0))
    assert written == [
        "pretrain/base started",
        "weak started",
        "pretrain/base  pretraining step 100: loss 1.2",
        "weak  step 3/9  accuracy 0.250",
        "pretrain/base done after 12 s",
        "weak failed after 1 s: exit code 4: NaN",
    ]


def test_bars_show_step_metrics_and_how_a_job_ended(tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=140)
    base, run = jobs(tmp_path)
    with TerminalWatcher(console) as watcher:
        watcher.started(base)
        watcher.started(run)
        watcher.tick([base, run])
        watcher.ended(base, Outcome("done", 0))
        watcher.ended(run, Outcome("failed", 4, "exit code 4: NaN"))
        watcher.ended(
            Job("other", ("x",), tmp_path / "x.log"), Outcome("blocked", reason="it needs weak, which failed")
        )
    shown = console.file.getvalue()
    for words in ("3/9", "loss 1.2", "failed: exit code 4: NaN", "other blocked: it needs weak, which failed"):
        assert words in shown
