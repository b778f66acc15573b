"""A batch that an engine in other processes works on, as the main thread sees it: an iterator over its groups."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future

from ..types import Group
from .faults import Abandoned
from .loop import POLL_S


class Flight(Iterator[Group]):
    """Groups in the order they finish. They wait here until they are asked for."""

    def __init__(self, count: int, interrupted: Callable[[], bool]) -> None:
        """`count`: groups to come. `interrupted`: whether the process was asked to stop."""
        self.left, self.interrupted = count, interrupted
        self._landed: queue.SimpleQueue[Group | BaseException | None] = queue.SimpleQueue()
        self._work: Future[None] | None = None

    def fly(self, work: Future[None], finisher: Executor) -> None:
        """`work` finishes the groups by way of `finisher`; when it is done, nothing comes after what is there."""
        self._work = work
        work.add_done_callback(lambda _: finisher.submit(self._landed.put, None))

    def land(self, group: Group) -> None:
        """A group is finished."""
        self._landed.put(group)

    def guarded(self, function: Callable[..., None], *arguments: object) -> None:
        """Call `function`; what it raises is raised where groups are asked for."""
        try:
            function(*arguments)
        except Exception as error:
            self._landed.put(error)

    def __next__(self) -> Group:
        """Wait for a group. Raises what ended the work; Abandoned when the process was asked to stop."""
        if not self.left:
            self.close()
            raise StopIteration
        while True:
            try:
                found = self._landed.get(timeout=POLL_S)
            except queue.Empty:
                if self.interrupted():
                    self.close()
                    raise Abandoned from None
                continue
            if isinstance(found, Group):
                self.left -= 1
                return found
            assert self._work is not None, "nothing lands before it flies"
            if found is None:
                self._work.result()
                raise RuntimeError("generation ended before its last group")
            self.close()
            raise found

    def close(self) -> None:
        """Give up what is not finished."""
        if self._work is not None:
            self._work.cancel()
