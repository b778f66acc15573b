"""Failures of one rank that all ranks must end with: told on the control group, raised on every rank alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..exit_codes import UnusableInput
from ..rollout.faults import Abandoned, RolloutFailed
from .layout import Layout, gather_json

KINDS: tuple[type[Exception], ...] = (RolloutFailed, Abandoned, UnusableInput)


@contextmanager
def agreed(layout: Layout) -> Iterator[None]:
    """When the block ends with RolloutFailed, Abandoned or UnusableInput on any rank, every rank raises it, with the
    same words.

    A meeting of all ranks: none goes on to a collective of the model while another still waits for a server.
    """
    problem: Exception | None = None
    try:
        yield
    except KINDS as error:
        problem = error
    mine = None if problem is None else [_kind_of(problem), str(problem)]
    told: list[Any] = [mine] if layout.world_size == 1 else gather_json(mine, layout.control)
    for one in told:
        if one is not None:
            raise KINDS[one[0]](one[1]) from problem


def _kind_of(problem: Exception) -> int:
    return next(index for index, kind in enumerate(KINDS) if isinstance(problem, kind))
