"""The fake server's memory: prefixes it has cached, and what it has given back."""

from __future__ import annotations

from itertools import takewhile


class Crash(Exception):  # noqa: N818 - it happens to a server, on purpose
    """What a real server does not survive."""


class FakeMemory:
    """A prefix cache by `extra_key`, and memory by tag. Misuse is a Crash, as an assertion of SGLang's scheduler is."""

    def __init__(self) -> None:
        self.cached: dict[str | None, list[list[int]]] = {}
        self.released: set[str] = set()
        self.crashes: list[str] = []
        """What ended the server, in order."""

    def hit(self, key: str | None, ids: list[int]) -> int:
        """Leading tokens of `ids` that are cached; the last one is always computed."""
        if self.released:
            raise self.crash("generation without memory")
        return max((min(_common(known, ids), len(ids) - 1) for known in self.cached.get(key, [])), default=0)

    def keep(self, key: str | None, ids: list[int]) -> None:
        """`ids` were computed."""
        self.cached.setdefault(key, []).append(ids)

    def release(self, tags: set[str], *, idle: bool) -> None:
        """Give memory back."""
        if not idle:
            raise self.crash("released while requests run")
        self.released |= tags
        self.cached.clear()

    def resume(self, tags: set[str]) -> None:
        """Take it again, with nothing of what was there."""
        if not tags <= self.released:
            raise self.crash("resumed what was not released")
        self.released -= tags

    def load_weights(self) -> None:
        """Weights are written."""
        if "weights" in self.released:
            raise self.crash("weights without memory")

    def flush(self) -> None:
        """Forget all prefixes."""
        self.cached.clear()

    def restart(self) -> None:
        """As a new process has it."""
        self.cached.clear()
        self.released.clear()

    def crash(self, why: str) -> Crash:
        self.crashes.append(why)
        return Crash(why)


def _common(one: list[int], other: list[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
