"""Programs that hang, fork, allocate, talk or lie end within their limits, and are told apart."""

import asyncio
import os
import platform
import sys
from pathlib import Path

import pytest

from megatron_urlvr.rewards import ProviderContext, get_provider, get_reward
from megatron_urlvr.rewards.checking import code_block
from megatron_urlvr.rewards.sandbox import ARCHITECTURES, Limits, run_python, why_unavailable
from megatron_urlvr.types import Group, Prompt, Sample

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
LIMITS = Limits(seconds=0.5, memory_mb=256)
PATIENT = Limits(seconds=60, memory_mb=256)
"""For programs that end by themselves, on a machine however busy."""
MARK = "assert add(1, 2) == 3"


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("assert 1 + 1 == 2", "passed"),
        ("import json, math, re, collections, itertools, functools, heapq; assert math.sqrt(4) == 2", "passed"),
        ("print('x' * 10**7)", "passed"),
        ("import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()", "passed"),
        ("assert False", "failed"),
        ("1 +", "failed"),
        ("import os\nos._exit(0)", "failed"),
        ("raise SystemExit(0)", "failed"),
        ("import sys\nsys.exit()", "failed"),
        ("while True: pass", "time"),
        ("import time\ntime.sleep(100)", "time"),
        ("import signal\nsignal.setitimer(signal.ITIMER_REAL, 0)\nwhile True: pass", "time"),
        ("x = bytearray(10**10)", "memory"),
        ("x = []\nwhile True: x.append('a' * 10**6)", "memory"),
        ("import ctypes\nctypes.string_at(0)", "killed"),
    ],
)
def test_programs_end_as_they_should(source, kind):
    assert run_python(source, LIMITS if kind == "time" else PATIENT).kind == kind


@pytest.mark.parametrize(
    "power",
    [
        "os.fork()",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "__import__('subprocess').run(['true'])",
        "os.execv('/bin/true', ['true'])",
        "__import__('socket').socket()",
        "__import__('socket').socketpair()",
        "open('left_behind', 'w')",
        "os.open('left_behind', os.O_CREAT | os.O_RDWR)",
        "os.mkdir('left_behind')",
        "os.unlink(__import__('sys').executable)",
        "os.kill(os.getppid(), 9)",
        "os.kill(-1, 9)",
        "__import__('resource').setrlimit(__import__('resource').RLIMIT_AS, (-1, -1))",
        "os.memfd_create('x')",
    ],
)
def test_powers_are_refused_and_the_program_may_go_on(power):
    caught = f"import os\ntry:\n    {power}\nexcept (OSError, ValueError):\n    pass\nelse:\n    raise SystemExit"
    assert run_python(caught, PATIENT).kind == "passed"
    assert run_python(f"import os\n{power}", PATIENT).kind == "failed"


def test_a_program_that_forks_without_end_leaves_nobody_behind():
    outcome = run_python("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", LIMITS)
    assert outcome.kind == "time"
    assert not [pid for pid in os.listdir("/proc") if pid.isdigit() and _runs_worker(pid)]


def _runs_worker(pid):
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        parent = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1]
    except OSError:
        return False
    return any(word.endswith(b"sandbox_worker.py") for word in words) and int(parent) == os.getpid()


def test_a_success_that_is_only_printed_is_none():
    everywhere = "    try: os.write(fd, b'passed')\n    except OSError: pass\n"
    assert run_python(f"import os\nfor fd in range(20):\n{everywhere}os._exit(0)", PATIENT).kind == "failed"


def test_code_comes_from_the_last_closed_block():
    assert code_block("```python\na\n```\ntext\n```\nb\n```") == "b\n"
    assert code_block("```python\na") is None
    assert code_block("a = 1") is None


def test_every_response_is_run_against_its_prompts_tests_and_what_was_stopped_is_counted_and_said(capsys):
    texts = [
        "```python\ndef add(a, b): return a + b\n```",
        "```python\ndef add(a, b): return a - b\n```",
        "```python\nwhile True: pass\n```",
        "```python\nx = bytearray(10**11)\n```",
        "no program",
        "```python\nwhile True: pass\n```",
    ]
    samples = [Sample("p", i, [1], text, "stop") for i, text in enumerate(texts)]
    group = Group(Prompt("p", "add", (1,), {"tests": MARK}), samples)
    cls = get_provider("unit_tests")
    context = ProviderContext(0, lambda *_: None, lambda _: None, lambda _: {})
    tests = cls(cls.Options(seconds=1.5, memory_mb=256), context)
    assert list(tests.problems([group.prompt])) == []
    asyncio.run(tests.fetch([group]))
    reward = get_reward("program")()
    scores = reward.score(group)
    assert scores.tolist() == [1, 0, 0, 0, 0, 0]
    assert reward.counts([group], [scores]) == [{"stopped": 0.5}]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2  # one line a kind, however many programs
    assert any("sample 2 of prompt 'p' was stopped (longer than 1.5 s)" in line for line in said)
    assert any("sample 3 of prompt 'p' was stopped (more than 256 MB)" in line for line in said)


def test_prompts_without_tests_and_other_systems_are_sentences(monkeypatch):
    cls = get_provider("unit_tests")
    tests = cls(cls.Options(), ProviderContext(0, lambda *_: None, lambda _: None, lambda _: {}))
    (problem,) = tests.problems([Prompt("a", "", (1,), {"tests": MARK}), Prompt("b", "", (1,))])
    assert "1 of 2 prompts have no tests ('b' first)" in problem
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "needs Linux" in str(why_unavailable())
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert all(name in str(why_unavailable()) for name in ARCHITECTURES)
