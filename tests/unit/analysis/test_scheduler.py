"""The scheduler: slots, dependencies, failures that stay local, and signals that leave resumable jobs."""

import os
import signal
import sys

import pytest

from megatron_urlvr.analysis.scheduler import Job, Scheduler

WAITS = (
    "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *a: sys.exit(75));"
    "print('ready', flush=True)\nwhile True: time.sleep(0.05)"
)
IGNORES = (
    "import os, signal, time; signal.signal(signal.SIGTERM, lambda *a: os.write(1, b'ignored\\n')); helper = os.fork();"
    "os.write(1, b'ready\\n' if helper else b'helper\\n')\nwhile True: time.sleep(0.05)"
)
"""Both wait in short sleeps: a signal that comes between the line and `signal.pause()` would be handled at the next."""


class Recorder:
    """A watcher that remembers, and that can act on every tick."""

    def __init__(self, on_tick=lambda running: None):
        self.events, self.running, self.most, self.on_tick = [], 0, 0, on_tick

    def started(self, job):
        self.events.append(("started", job.name))
        self.running += 1
        self.most = max(self.most, self.running)

    def tick(self, running):
        self.on_tick(running)

    def ended(self, job, outcome):
        self.events.append((outcome.state, job.name))
        self.running -= outcome.exit_code is not None

    def message(self, text):
        self.events.append(("message", text))


def job(folder, name, code="", **options):
    return Job(name, (sys.executable, "-c", code), folder / f"{name}.log", **options)


def says(one, line):
    return line in one.log.read_text().splitlines()


def run(jobs, slots=2, watcher=None):
    watcher = watcher or Recorder()
    scheduler = Scheduler(jobs, slots=slots, environment=os.environ, watcher=watcher)
    return scheduler, scheduler.run(), watcher


def test_no_more_jobs_run_at_once_than_there_are_slots(tmp_path):
    _, outcomes, watcher = run([job(tmp_path, str(k)) for k in range(5)], slots=2)
    assert {outcome.state for outcome in outcomes.values()} == {"done"}
    assert watcher.most == 2


def test_a_job_starts_only_when_what_it_needs_is_done(tmp_path):
    jobs = [job(tmp_path, "run", after=("base",)), job(tmp_path, "base")]
    _, _, watcher = run(jobs)
    assert watcher.events == [("started", "base"), ("done", "base"), ("started", "run"), ("done", "run")]


def test_a_failure_blocks_what_depends_on_it_and_nothing_else(tmp_path):
    jobs = [
        job(tmp_path, "base", "print('first'); raise SystemExit('no space left')"),
        job(tmp_path, "run", after=("base",)),
        job(tmp_path, "next", after=("run",)),
        job(tmp_path, "other"),
    ]
    _, outcomes, _ = run(jobs)
    assert {name: outcome.state for name, outcome in outcomes.items()} == {
        "base": "failed",
        "run": "blocked",
        "next": "blocked",
        "other": "done",
    }
    assert outcomes["base"].reason == "exit code 1: no space left"
    assert outcomes["run"].reason == "it needs base, which failed"
    assert outcomes["next"].reason == "it needs run, which could not start"


def test_a_job_that_died_of_a_signal_says_which(tmp_path):
    _, outcomes, _ = run([job(tmp_path, "run", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")])
    assert outcomes["run"].reason == "killed by SIGKILL"


def test_a_run_that_a_monitor_stopped_has_an_outcome_and_is_no_failure(tmp_path):
    _, outcomes, _ = run([job(tmp_path, "run", "raise SystemExit(3)")])
    assert (outcomes["run"].state, outcomes["run"].exit_code) == ("done", 3)


def test_an_obstacle_found_at_the_start_is_the_reason_of_the_failure(tmp_path):
    _, outcomes, _ = run([job(tmp_path, "run", obstacle=lambda: "the snapshot is not there")])
    assert outcomes["run"].reason == "the snapshot is not there"
    assert not (tmp_path / "run.log").exists()


def test_each_attempt_is_appended_to_the_log_under_its_command_and_gets_the_environment(tmp_path):
    one = job(tmp_path, "run", "import os; print(os.environ['OMP_NUM_THREADS'])")
    for _ in range(2):
        Scheduler([one], slots=1, environment={**os.environ, "OMP_NUM_THREADS": "1"}, watcher=Recorder()).run()
    lines = one.log.read_text().splitlines()
    assert lines[1::2] == ["1", "1"]
    assert all(line.startswith("$ ") and "OMP_NUM_THREADS" in line for line in lines[::2])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_running_jobs_through_their_own_handlers_and_starts_no_others(tmp_path, number):
    sent: list[int] = []

    def when_ready(running):
        if not sent and all(says(each, "ready") for each in running):
            sent.append(number)
            os.kill(os.getpid(), number)

    jobs = [job(tmp_path, "a", WAITS), job(tmp_path, "b", WAITS), job(tmp_path, "c", WAITS)]
    before = signal.getsignal(number)
    scheduler, outcomes, watcher = run(jobs, slots=2, watcher=Recorder(when_ready))
    assert [outcome.state for outcome in outcomes.values()] == ["interrupted"] * 3
    assert [outcome.exit_code for outcome in outcomes.values()] == [75, 75, None]
    assert scheduler.interrupted
    assert any(kind == "message" and "once more kills" in text for kind, text in watcher.events)
    assert signal.getsignal(number) is before


def test_a_second_signal_kills_a_job_with_its_helpers(tmp_path):
    stubborn, sent = job(tmp_path, "a", IGNORES), []

    def when_ready(running):
        forked = says(stubborn, "ready") and says(stubborn, "helper")
        if (forked and not sent) or (says(stubborn, "ignored") and len(sent) == 1):
            sent.append(signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    _, outcomes, _ = run([stubborn], watcher=Recorder(when_ready))
    assert outcomes["a"].exit_code == -signal.SIGKILL
    assert outcomes["a"].state == "interrupted"


def test_after_its_time_nothing_is_started_and_what_runs_comes_to_its_end(tmp_path):
    now = [0.0]
    first = job(tmp_path, "first", "print('whole')")
    scheduler = Scheduler(
        [first, job(tmp_path, "second")],
        slots=1,
        environment=os.environ,
        watcher=Recorder(on_tick=lambda running: now.__setitem__(0, 11.0)),
        limit_s=10,
        clock=lambda: now[0],
    )
    outcomes = scheduler.run()
    assert (outcomes["first"].state, outcomes["second"].state) == ("done", "interrupted")
    assert says(first, "whole")
    assert scheduler.interrupted
    assert not scheduler.signalled
