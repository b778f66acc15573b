"""Data-parallel replicas as threads of this process, with a sum and a gathering over them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch


class Replicas:
    """`count` replicas that meet at every collective."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._barrier = threading.Barrier(count, timeout=10)
        self._slots: list[Any] = [None] * count

    def run(self, work: Callable[[int, Callable[..., Any], Callable[..., Any]], Any]) -> list[Any]:
        """Results of `work(rank, total, gather)` on every replica."""
        with ThreadPoolExecutor(self.count) as threads:
            return list(threads.map(lambda rank: work(rank, self._total(rank), self._gather(rank)), range(self.count)))

    def _gather(self, rank: int) -> Callable[[Any], Sequence[Any]]:
        def gather(value: Any) -> Sequence[Any]:
            self._slots[rank] = value
            self._barrier.wait()
            everyone = list(self._slots)
            self._barrier.wait()
            return everyone

        return gather

    def _total(self, rank: int) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda value: torch.stack(list(self._gather(rank)(value))).sum(0)


class Wire:
    """`torch.distributed`'s exchange among threads, and how much went over it."""

    def __init__(self) -> None:
        self.sent: list[int] = []

    def all_to_all_single(
        self, received: torch.Tensor, own: torch.Tensor, coming: list[int], going: list[int], *, group: Any
    ) -> None:
        everyone = group((own.split(going), coming))
        me = next(k for k, (_, expected) in enumerate(everyone) if expected is coming)
        assert going[me] == 0
        self.sent.append(len(own))
        received.copy_(torch.cat([pieces[me] for pieces, _ in everyone]))
