"""Signals that end a run so that it can be resumed: SIGTERM, SIGUSR1 (schedulers) and Ctrl-C."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Preempted(Exception):  # noqa: N818 - not an error: the run goes on another time
    """A signal arrived; the step in progress is given up."""


class Interrupts:
    """Remembers the first signal; the loop asks at safe points. A second Ctrl-C interrupts at once."""

    def __init__(self, *, announce: bool) -> None:
        """`announce`: say on standard error that a signal was heard (by one rank alone)."""
        self.announce = announce
        self.received: str | None = None
        self._process = os.getpid()

    @contextmanager
    def listening(self) -> Iterator[Interrupts]:
        """Handle the signals while the block runs, and restore the handlers before."""
        before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a forked child has inherited the handler; what ends the run is for its parent
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is None and self.announce:
            text = f"\n{signal.Signals(number).name}: giving up the step in progress, saving the last completed one"
            text += "; Ctrl-C again stops at once\n" if number == signal.SIGINT else "\n"
            os.write(2, text.encode())  # a handler may have interrupted a print, which cannot be entered twice
        self.received = signal.Signals(number).name
