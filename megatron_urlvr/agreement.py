"""Failures of one rank that all ranks must end with: told on the control group, raised on every rank alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .layout import Layout, gather_json
from .rollout.faults import Abandoned, RolloutFailed

SHARED = {kind.__name__: kind for kind in (RolloutFailed, Abandoned)}


@contextmanager
def agreed(layout: Layout) -> Iterator[None]:
    """When the block ends with RolloutFailed or Abandoned on any rank, every rank raises it, with the same words.

    A meeting of all ranks: none goes on to a collective of the model while another still waits for a server.
    """
    problem: Exception | None = None
    try:
        yield
    except (RolloutFailed, Abandoned) as error:
        problem = error
    mine = None if problem is None else [type(problem).__name__, str(problem)]
    told = [mine] if layout.world_size == 1 else gather_json(mine, layout.control)
    for one in told:
        if one is not None:
            raise SHARED[one[0]](one[1]) from problem
