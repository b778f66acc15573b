"""The order in which training prompts are served: deterministic epochs that can be resumed."""

import random
from collections.abc import Sequence
from typing import Any

from ..types import Prompt
from .errors import DataError


class PromptStream:
    """Endless epochs over `prompts`; each epoch serves every prompt once.

    With `shuffle`, `seed` and the epoch's number decide its order; otherwise it is the given order. A batch never holds
    a prompt twice: where it crosses into a new epoch, the prompts it already has move to that epoch's end.
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, shuffle: bool) -> None:
        if not prompts:
            raise DataError("there are no prompts to serve; the data set is empty")
        self._prompts = prompts
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = 0
        self._position = 0
        self._deferred: list[int] = []
        self._order = self._order_of(0, [])

    @property
    def epoch(self) -> int:
        """Number of the current epoch, from 0."""
        return self._epoch

    def next(self, n: int) -> list[Prompt]:
        """The next `n` distinct prompts. DataError if the set has fewer."""
        if n > len(self._prompts):
            raise DataError(
                f"a batch of {n} prompts was asked for, and the set has {len(self._prompts)}: "
                f"use at most {len(self._prompts)} prompts a step, or more data"
            )
        taken = self._take(n)
        if len(taken) < n:
            self._epoch += 1
            self._position = 0
            self._deferred = taken
            self._order = self._order_of(self._epoch, taken)
            taken = taken + self._take(n - len(taken))
        return [self._prompts[i] for i in taken]

    def _take(self, n: int) -> list[int]:
        taken = self._order[self._position : self._position + n]
        self._position += len(taken)
        return taken

    def _order_of(self, epoch: int, deferred: list[int]) -> list[int]:
        order = list(range(len(self._prompts)))
        if self._shuffle:
            random.Random(f"prompts/{self._seed}/{epoch}").shuffle(order)
        late = set(deferred)
        return [i for i in order if i not in late] + [i for i in order if i in late]

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream, JSON-able."""
        return {
            "size": len(self._prompts),
            "seed": self._seed,
            "shuffle": self._shuffle,
            "epoch": self._epoch,
            "position": self._position,
            "deferred": list(self._deferred),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`. DataError if it belongs to another set, seed or order."""
        mine = self.state_dict()
        changed = [
            f"{key} was {state[key]!r}, is {mine[key]!r}"
            for key in ("size", "seed", "shuffle")
            if state[key] != mine[key]
        ]
        if changed:
            raise DataError(
                f"the saved place in the prompt stream does not fit this data ({'; '.join(changed)}): "
                "resume with the data, seed and shuffling the run began with"
            )
        self._epoch = int(state["epoch"])
        self._position = int(state["position"])
        self._deferred = [int(i) for i in state["deferred"]]
        self._order = self._order_of(self._epoch, self._deferred)
