"""How a process ends: exit codes, and the base class of errors that mean unusable input."""

import errno
from enum import IntEnum

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""`OSError.errno` where a file could not be written for want of space, quota or permitted size."""


class ExitCode(IntEnum):
    """Exit codes of every command; a run's `status.json` says the same in words."""

    DONE = 0
    FAILED = 1
    """An error nobody foresaw; the traceback is on stderr."""
    UNUSABLE_INPUT = 2
    """A config, dataset, checkpoint or argument that cannot be used; nothing was trained."""
    STOPPED = 3
    """A monitor stopped the run."""
    NON_FINITE = 4
    """The loss or the gradient was NaN or infinite; the batch is kept for replay."""
    NO_SERVERS = 5
    """No rollout server is left."""
    PREEMPTED = 75
    """Ended by a signal, resumable (EX_TEMPFAIL, so that schedulers requeue)."""


class UnusableInput(ValueError):  # noqa: N818 - named for what the user gave, not for a failure
    """What the user gave cannot be used. The message is one or more whole sentences; commands print it without a
    traceback and exit with `ExitCode.UNUSABLE_INPUT`."""
