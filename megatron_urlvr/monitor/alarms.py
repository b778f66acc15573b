"""Alarms: one line when a metric crosses its limit, one number in the metrics while it is beyond."""

from __future__ import annotations

import sys


class Alarms:
    """Limits that are watched. `announce`: whether this process prints."""

    def __init__(self, *, announce: bool) -> None:
        self.announce = announce
        self._raised: set[str] = set()

    def watch(self, name: str, value: float, limit: float | None, meaning: str) -> dict[str, float]:
        """`{<name>: 1.0}` while `value` is over `limit`, else 0.0; nothing without a limit. `meaning` is a sentence
        that says what it is a sign of; it is printed when the limit is crossed, not again while it stays crossed."""
        if limit is None:
            return {}
        over = value > limit
        if over and name not in self._raised and self.announce:
            print(f"{name}: {value:.4g} is over {limit:g}. {meaning}", file=sys.stderr, flush=True)
        (self._raised.add if over else self._raised.discard)(name)
        return {name: float(over)}
