"""The process of one program: reads a token and a source from standard input, gives up its powers, runs the source, and
leaves the token in a page that it shares with whoever started it, if it ran to its end. Run as a file by `sandbox.py`;
it imports nothing of this package.

What is left to it is a list of system calls: those that compute, read, and change nothing but the process itself. All
others fail. Its standard streams are /dev/null, and it has no other open file.
"""

import ctypes
import mmap
import os
import platform
import resource
import signal
import struct
import sys

UNSTARTED = 97
ALLOW, EPERM, ENOSYS, KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
"""Returns of a seccomp filter: allow; fail with EPERM or ENOSYS; kill the process."""
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
LOAD, EQUAL, ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06
"""Opcodes of classic BPF: load a word, jump if equal, jump if any bit is set, return."""
NUMBER, ARCH, ARGS = 0, 4, 16
"""Offsets in `struct seccomp_data`; every argument has 8 bytes, the low word first."""

Numbers = tuple[int | None, int | None]
"""Of a call on x86_64 and aarch64; None where the architecture lacks it."""
ALLOWED: dict[str, Numbers] = {
    # files that are open, or are opened for reading
    "read": (0, 63), "readv": (19, 65), "pread64": (17, 67), "preadv": (295, 69), "write": (1, 64), "writev": (20, 66),
    "close": (3, 57), "lseek": (8, 62), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "pipe": (22, None),
    "pipe2": (293, 59), "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72),
    # looking at files
    "stat": (4, None), "lstat": (6, None), "fstat": (5, 80), "newfstatat": (262, 79), "statx": (332, 291),
    "statfs": (137, 43), "fstatfs": (138, 44), "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439),
    "readlink": (89, None), "readlinkat": (267, 78), "getdents": (78, None), "getdents64": (217, 61),
    "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50), "umask": (95, 166),
    # its own memory and threads
    "mmap": (9, 222), "munmap": (11, 215), "mprotect": (10, 226), "mremap": (25, 216), "brk": (12, 214),
    "futex": (202, 98), "set_robust_list": (273, 99), "set_tid_address": (218, 96), "rseq": (334, 293),
    "exit": (60, 93), "exit_group": (231, 94), "sched_yield": (24, 124), "sched_getaffinity": (204, 123),
    "getcpu": (309, 168),
    # its own signals and timers
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133), "sigaltstack": (131, 132), "pause": (34, None),
    "restart_syscall": (219, 128), "getitimer": (36, 102), "setitimer": (38, 103), "alarm": (37, None),
    # time, and who and where it is
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153), "getrusage": (98, 165),
    "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getuid": (102, 174), "geteuid": (107, 175),
    "getgid": (104, 176), "getegid": (108, 177), "getgroups": (115, 158), "getpgrp": (111, None),
    "getpgid": (121, 155), "getsid": (124, 156), "getrandom": (318, 278), "uname": (63, 160), "sysinfo": (99, 179),
    "getrlimit": (97, 163),
}  # fmt: skip
VALUES: dict[str, tuple[Numbers, int, tuple[int, ...]]] = {
    "fcntl": ((72, 25), 1, (0, 1, 2, 3, 1030)),  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC; no F_SETOWN
    "ioctl": ((16, 29), 1, (0x5401, 0x5413, 0x541B, 0x5450, 0x5451)),  # TCGETS, TIOCGWINSZ, FIONREAD, FIONCLEX, FIOCLEX
    "prctl": ((157, 167), 0, (15, 16)),  # PR_SET_NAME, PR_GET_NAME
    "madvise": ((28, 233), 2, (0, 1, 2, 3, 4, 8, 14, 15)),  # not MADV_HWPOISON, with which root retires memory
}
"""Calls that are allowed when an argument has one of these values: which argument, and the values."""
OPEN: dict[str, tuple[Numbers, int]] = {"open": ((2, None), 1), "openat": ((257, 56), 2)}
"""Calls that open a file, and which argument holds the flags."""
WRITING = 0o1 | 0o2 | 0o100 | 0o1000 | 0o2000
"""O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, O_APPEND."""
CLONE, CLONE3 = (56, 220), (435, 435)
CLONE_THREAD = 0x00010000
CLONE_NAMESPACES = 0x7E020000
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET."""

Instruction = tuple[int, int, int, int]
"""Opcode, jump if true, jump if false, operand."""


def filter_program(machine: str) -> bytes:
    """The seccomp filter of an architecture, as `struct sock_filter[]`."""
    column = list(AUDIT_ARCH).index(machine)
    code: list[Instruction] = [
        (LOAD, 0, 0, ARCH),
        (EQUAL, 1, 0, AUDIT_ARCH[machine]),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
    ]

    def on(numbers: Numbers, block: list[Instruction]) -> None:
        if (number := numbers[column]) is not None:
            code.extend([(EQUAL, 0, len(block), number), *block])

    for numbers in ALLOWED.values():
        on(numbers, [(RETURN, 0, 0, ALLOW)])
    for numbers, argument, values in VALUES.values():
        tests: list[Instruction] = [(EQUAL, len(values) - k, 0, value) for k, value in enumerate(values)]
        on(numbers, [(LOAD, 0, 0, ARGS + 8 * argument), *tests, (RETURN, 0, 0, EPERM), (RETURN, 0, 0, ALLOW)])
    for numbers, argument in OPEN.values():
        flags = (LOAD, 0, 0, ARGS + 8 * argument)
        on(numbers, [flags, (ANY_BIT, 0, 1, WRITING), (RETURN, 0, 0, EPERM), (RETURN, 0, 0, ALLOW)])
    on(CLONE3, [(RETURN, 0, 0, ENOSYS)])  # libc then uses clone, whose flags can be seen
    threads_alone: list[Instruction] = [
        (LOAD, 0, 0, ARGS),
        (ANY_BIT, 1, 0, CLONE_NAMESPACES),
        (ANY_BIT, 1, 0, CLONE_THREAD),
        (RETURN, 0, 0, EPERM),
        (RETURN, 0, 0, ALLOW),
    ]
    on(CLONE, threads_alone)
    code.append((RETURN, 0, 0, EPERM))
    return b"".join(struct.pack("HBBI", *each) for each in code)


def give_up_powers(seconds: float, memory: int) -> None:
    """Limits and filter, for good. OSError when the kernel refuses."""
    whole = max(1, int(seconds + 0.999))
    for what, limit in (
        (resource.RLIMIT_CPU, whole),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, 1 << 16),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        resource.setrlimit(what, (limit, limit))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    libc = ctypes.CDLL(None, use_errno=True)
    program = filter_program(platform.machine())
    text = ctypes.create_string_buffer(program, len(program))

    class Program(ctypes.Structure):
        _fields_ = (("count", ctypes.c_ushort), ("code", ctypes.c_void_p))

    body = Program(len(program) // 8, ctypes.addressof(text))
    no_new_privs, set_seccomp, mode_filter = 38, 22, 2
    for arguments in (
        (no_new_privs, 1, 0, 0, 0),
        (set_seccomp, mode_filter, ctypes.byref(body), 0, 0),
    ):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), "prctl")


def main() -> None:
    """One program."""
    seconds, memory, descriptor = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    token, _, source = sys.stdin.buffer.read().decode().partition("\n")
    page = mmap.mmap(descriptor, 0)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.closerange(3, descriptor + 3)  # its own, mmap's copy and null; the page stays mapped
    try:
        give_up_powers(seconds, memory)
    except OSError as error:
        _leave(page, str(error))
        os._exit(UNSTARTED)
    said = token
    try:
        exec(compile(source, "<program>", "exec"), {"__name__": "__main__"})
    except MemoryError:
        said = "memory"
    except BaseException as error:
        said = type(error).__name__
    _leave(page, said)
    os._exit(0)


def _leave(page: mmap.mmap, said: str) -> None:
    """Leave a word for whoever started this, as much of it as the page holds."""
    words = said.encode("utf-8", "replace")[: len(page)]
    page[: len(words)] = words


if __name__ == "__main__":
    main()
