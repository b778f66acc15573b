"""The process of one program: reads a token and a source from standard input, gives up its powers, runs the source, and
writes the token back if it ran to its end. Run as a file by `sandbox.py`; it imports nothing of this package.

Without its powers: `clone` only for threads, no other way to start a process or a program; no sockets; files for
reading alone; no signals to others, no looking into them.
"""

import ctypes
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
LOAD, EQUAL, ANY_BIT, AT_LEAST, RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
"""Opcodes of classic BPF: load a word, jump if equal, jump if any bit is set, jump if at least, return."""
NUMBER, ARCH, ARGS = 0, 4, 16
"""Offsets in `struct seccomp_data`; every argument has 8 bytes, the low word first."""
CLONE_THREAD = 0x00010000
WRITING = 0o1 | 0o2 | 0o100 | 0o1000 | 0o2000
"""O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, O_APPEND."""

# x86_64, aarch64; None where the architecture lacks the call.
REFUSED: dict[str, tuple[int | None, int | None]] = {
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200), "sendto": (44, 206),
    "sendmsg": (46, 211), "io_uring_setup": (425, 425),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "creat": (85, None), "truncate": (76, 45), "unlink": (87, None), "unlinkat": (263, 35), "rename": (82, None),
    "renameat": (264, 38), "renameat2": (316, 276), "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None),
    "link": (86, None), "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36), "mknod": (133, None),
    "mknodat": (259, 33), "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "setxattr": (188, 5), "mount": (165, 40),
    "umount2": (166, 39), "unshare": (272, 97), "setns": (308, 268), "bpf": (321, 280), "memfd_create": (319, 279),
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180), "utimensat": (280, 88),
    "prlimit64": (302, 261), "setrlimit": (160, 164), "userfaultfd": (323, 282), "perf_event_open": (298, 241),
    "openat2": (437, 437), "keyctl": (250, 219), "add_key": (248, 217), "setsid": (112, 157), "setpgid": (109, 154),
}  # fmt: skip
OPEN: dict[str, tuple[int | None, int | None, int]] = {"open": (2, None, 1), "openat": (257, 56, 2)}
"""Calls that open a file, and which argument holds the flags."""
CLONE, CLONE3 = (56, 220), (435, 435)


def filter_program(machine: str) -> bytes:
    """The seccomp filter of an architecture, as `struct sock_filter[]`."""
    column = list(AUDIT_ARCH).index(machine)
    code: list[tuple[int, int, int, int]] = [
        (LOAD, 0, 0, ARCH),
        (EQUAL, 1, 0, AUDIT_ARCH[machine]),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
    ]
    if machine == "x86_64":
        code += [(AT_LEAST, 0, 1, 0x40000000), (RETURN, 0, 0, EPERM)]  # the x32 numbers of the same calls
    for numbers in REFUSED.values():
        if numbers[column] is not None:
            code += [(EQUAL, 0, 1, int(numbers[column] or 0)), (RETURN, 0, 0, EPERM)]
    for call in OPEN.values():
        if call[column] is not None:
            code += [
                (EQUAL, 0, 4, int(call[column] or 0)),
                (LOAD, 0, 0, ARGS + 8 * call[2]),
                (ANY_BIT, 0, 1, WRITING),
                (RETURN, 0, 0, EPERM),
                (RETURN, 0, 0, ALLOW),
            ]
    code += [
        (EQUAL, 0, 1, CLONE3[column]),
        (RETURN, 0, 0, ENOSYS),  # libc then uses clone, whose flags can be seen
        (EQUAL, 0, 4, CLONE[column]),
        (LOAD, 0, 0, ARGS),
        (ANY_BIT, 1, 0, CLONE_THREAD),
        (RETURN, 0, 0, EPERM),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, ALLOW),
    ]
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
    seconds, memory = float(sys.argv[1]), int(sys.argv[2])
    token, _, source = sys.stdin.buffer.read().decode().partition("\n")
    out = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1):
        os.dup2(null, stream)
    try:
        give_up_powers(seconds, memory)
    except OSError as error:
        os.write(out, str(error).encode())
        os._exit(UNSTARTED)
    said = token
    try:
        exec(compile(source, "<program>", "exec"), {"__name__": "__main__"})
    except MemoryError:
        said = "memory"
    except BaseException as error:
        said = type(error).__name__
    os.write(out, said.encode())
    os._exit(0)


if __name__ == "__main__":
    main()
