"""Programs that hang, fork, allocate, talk or lie end within their limits, and are told apart."""

import asyncio
import os
import platform
import re
import resource
import sys
from pathlib import Path

import pytest

from megatron_urlvr.rewards import ProviderContext, get_provider, get_reward
from megatron_urlvr.rewards.checking import code_block
from megatron_urlvr.rewards.sandbox import ARCHITECTURES, Limits, run_python, why_unavailable
from megatron_urlvr.rewards.sandbox_worker import ALLOWED, CLONE, OPEN, VALUES
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
        "os.utime(__import__('sys').executable)",
        "os.setxattr('/dev/null', 'user.x', b'')",
        "os.setpriority(os.PRIO_PROCESS, os.getppid(), 5)",
        "os.sched_setaffinity(os.getppid(), {0})",
        # signals to others through a file's owner
        "__import__('fcntl').fcntl(os.pipe()[0], __import__('fcntl').F_SETOWN, os.getpid())",
        "__import__('fcntl').fcntl(os.pipe()[0], 10, 9)",
        "__import__('fcntl').fcntl(os.pipe()[0], 15, bytes(8))",
        "__import__('fcntl').fcntl(os.pipe()[0], __import__('fcntl').F_SETFL, __import__('fcntl').FASYNC)",
        "__import__('fcntl').ioctl(os.pipe()[0], 0x5452, b'\\1\\0\\0\\0')",
        "__import__('fcntl').ioctl(os.pipe()[0], 0x8901, b'\\1\\0\\0\\0')",
        "__import__('fcntl').flock(os.open('/dev/null', 0), 1)",
    ],
)
def test_powers_are_refused_and_the_program_may_go_on(power):
    caught = f"import os\ntry:\n    {power}\nexcept (OSError, ValueError):\n    pass\nelse:\n    raise SystemExit"
    assert run_python(caught, PATIENT).kind == "passed"
    assert run_python(f"import os\n{power}", PATIENT).kind == "failed"


# By number on x86_64: every call that can change something outside of the process that makes it, as of Linux 6.18.
CHANGES_OUTSIDE = {
    "files, their names, owners, times and attributes": [
        18, 26, 40, 73, 74, 75, 76, 77, 82, 83, 84, 85, 86, 87, 88, 90, 91, 92, 93, 94, 132, 133, 161, 162, 188, 189,
        190, 197, 198, 199, 206, 209, 235, 258, 259, 260, 261, 263, 264, 265, 266, 268, 275, 276, 277, 278, 280, 285,
        296, 301, 306, 316, 319, 326, 328, 425, 426, 427, 437, 447, 452, 463, 466, 469,
    ],
    "processes, signals and their shares of the machine": [
        57, 58, 59, 62, 101, 109, 112, 129, 141, 142, 144, 160, 200, 203, 234, 251, 256, 279, 297, 298, 302, 308, 310,
        311, 314, 322, 424, 434, 438, 440, 448,
    ],
    "sockets, queues and shared memory": [
        29, 30, 31, 41, 42, 43, 44, 46, 48, 49, 50, 53, 54, 64, 65, 66, 68, 69, 70, 71, 220, 240, 241, 242, 243, 244,
        288, 307,
    ],
    "the machine": [
        103, 153, 154, 155, 159, 163, 164, 165, 166, 167, 168, 169, 170, 171, 172, 173, 174, 175, 176, 179, 180, 227,
        246, 248, 249, 250, 272, 300, 304, 305, 313, 317, 320, 321, 323, 428, 429, 430, 431, 432, 442, 443, 444, 446,
    ],
}  # fmt: skip
CLONE3 = 435
UNFILTERED = {335, 336}
"""uretprobe and uprobe, which the kernel lets pass every filter: outside of a probe they end the caller."""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers are those of x86_64")
def test_every_call_but_the_ones_that_compute_is_refused_by_number():
    kept = {numbers[0] for numbers in ALLOWED.values()} | {call[0][0] for call in [*VALUES.values(), *OPEN.values()]}
    kept.add(CLONE[0])
    listed = {number for numbers in CHANGES_OUTSIDE.values() for number in numbers}
    assert not listed & kept
    refused = sorted(set(range(600)) - kept - UNFILTERED - {CLONE3} | listed)
    refused += [0x40000000 | number for number in (0, 1, 57, 62)]  # the x32 numbers of the same calls
    source = (
        "import ctypes\ncall = ctypes.CDLL(None, use_errno=True).syscall\n"
        f"went = [n for n in {refused} if call(n, *[-1] * 6) != -1 or ctypes.get_errno() != 1]\n"
        "raise LookupError if went else SystemExit"
    )
    assert run_python(source, PATIENT).detail == "SystemExit"


HEADERS = {"x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "/usr/include/asm-generic/unistd.h"}


@pytest.mark.parametrize("machine", [name for name, path in HEADERS.items() if Path(path).exists()])
def test_the_numbers_are_those_of_the_kernels_headers(machine):
    defined = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", Path(HEADERS[machine]).read_text())
    known = {name: int(number) for name, number in defined}
    known.setdefault("newfstatat", known.get("fstatat", -1))  # its name in the generic table
    calls = ALLOWED | {name: numbers for name, (numbers, *_) in [*VALUES.items(), *OPEN.items()]}
    calls |= {"clone": CLONE, "clone3": (CLONE3, CLONE3)}
    column = ARCHITECTURES.index(machine)
    absent = set() if machine == "x86_64" else {name for name, numbers in calls.items() if numbers[1] is None}
    assert {name: numbers[column] for name, numbers in calls.items() if name not in absent} == {
        name: known[name] for name in calls if name not in absent
    }


def test_a_program_has_no_open_file_through_which_it_could_fill_another_process():
    source = (
        "import os\nopen_ = [fd for fd in range(4096) if os.path.exists(f'/proc/self/fd/{fd}')]\n"
        "assert open_ == [0, 1, 2], open_\n"
        "assert {os.readlink(f'/proc/self/fd/{fd}') for fd in open_} == {'/dev/null'}"
    )
    busy = [os.open(os.devnull, os.O_RDONLY) for _ in range(100)]  # the worker's page then has a high number
    try:
        assert run_python(source, PATIENT).kind == "passed"
    finally:
        for descriptor in busy:
            os.close(descriptor)
    write = "        try: os.write(fd, b'x' * 2**20)\n        except OSError: pass"
    flood = f"import os\nwhile True:\n    for fd in range(64):\n{write}"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert run_python(flood, LIMITS).kind == "time"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


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
