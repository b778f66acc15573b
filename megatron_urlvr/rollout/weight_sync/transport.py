"""The interface of what carries buckets to servers, and the transport that leaves it all to the snapshot."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from ..pool import Server
from .buckets import Bucket


class Transport(ABC):
    """Carries one update after the other.

    Invariants: an update is `open`, `send` for each bucket, `finish`; servers are paused meanwhile. No method raises
    for what servers do: a server that did not take all of an update is missing from what `finish` returns, and reads
    the snapshot instead. All methods run on the main thread.
    """

    packs: bool = True
    """Whether buckets are to be packed into one buffer."""

    @abstractmethod
    def open(self, members: Sequence[Server], *, restarted: bool) -> None:
        """An update for `members` begins. `restarted`: one of them is not the process it was."""

    @abstractmethod
    def send(self, bucket: Bucket, label: str | None) -> None:
        """Carry a bucket; with the last one goes the label of the weights."""

    @abstractmethod
    def finish(self) -> list[Server]:
        """The servers that hold all of the update."""

    def close(self) -> None:  # noqa: B027 - the disk needs nothing
        """Release what is held."""


class DiskTransport(Transport):
    """Carries nothing: every server reads the snapshot."""

    def open(self, members: Sequence[Server], *, restarted: bool) -> None:
        """See Transport."""

    def send(self, bucket: Bucket, label: str | None) -> None:
        """See Transport."""

    def finish(self) -> list[Server]:
        """Nobody: the snapshot is still to be read."""
        return []
