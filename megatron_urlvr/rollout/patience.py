"""How long a run waits while servers are missing, and what it says meanwhile."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from .faults import RolloutFailed

SAY_EVERY_S = 15.0


@dataclass
class Patience:
    """One wait for `what`, or several one after the other."""

    wait_s: float
    """`servers.wait_s`."""
    what: str = "rollout server"
    since: float | None = None
    """When they were first missing; None while they are there."""
    said: float = float("-inf")

    def missing(self, now: float, summary: str) -> None:
        """They are missing at `now`, seconds of any clock. RolloutFailed once that has lasted `wait_s`; before, from
        the first second on, a line an interval with `summary`."""
        self.since = now if self.since is None else self.since
        waited = now - self.since
        if waited > self.wait_s:
            raise RolloutFailed(f"no {self.what} for {waited:.0f} s (servers.wait_s = {self.wait_s:g}): {summary}")
        if waited >= 1 and now - self.said >= SAY_EVERY_S:
            self.said, left = now, self.wait_s - waited
            print(f"waiting for a {self.what}, {left:.0f} s more: {summary}", file=sys.stderr, flush=True)

    def found(self) -> None:
        """They are there."""
        self.since = None
