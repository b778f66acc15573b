"""Which sample is asked of which server, and when: a state machine without clocks or connections.

The votes of one prompt go to one server, so that they share its cached prefix. A server is never given more than its
limit. A sample that fails is asked for elsewhere where there is an elsewhere. Every sample is delivered exactly once,
however often it was asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Job:
    """One sample to be generated: the identity that makes asking twice harmless."""

    prompt: int
    """Position of the prompt in the batch."""
    index: int
    """Position of the sample in its group."""


@dataclass
class _Place:
    """A server as the schedule sees it."""

    limit: int
    queue: deque[Job] = field(default_factory=deque)
    running: set[Job] = field(default_factory=set)

    @property
    def load(self) -> float:
        """Samples it has, over those it can work on."""
        return (len(self.running) + len(self.queue)) / max(1, self.limit)


class Schedule:
    """Samples waiting, running and done."""

    def __init__(self, prompts: int, n: int) -> None:
        self.waiting: deque[list[Job]] = deque([Job(p, i) for i in range(n)] for p in range(prompts))
        self.retries: deque[Job] = deque()
        self.done: set[Job] = set()
        self.n, self.total = n, prompts * n
        self.failures: dict[Job, int] = {}
        self.avoids: dict[Job, str] = {}
        """The server that failed a sample last."""
        self.places: dict[str, _Place] = {}

    @property
    def finished(self) -> bool:
        """Every sample was delivered."""
        return len(self.done) == self.total

    def running_on(self, server: str) -> int:
        """Requests that `server` works on."""
        place = self.places.get(server)
        return len(place.running) if place else 0

    def join(self, server: str, limit: int) -> None:
        """`server` takes requests from now on, `limit` at once. Said again, the limit is another from now on."""
        self.places.setdefault(server, _Place(limit)).limit = limit

    def leave(self, server: str) -> None:
        """`server` gets no more requests; what was queued for it alone goes elsewhere. Running ones end by
        `delivered` or `failed`."""
        place = self.places.pop(server, None)
        if place is not None:
            self.retries.extend(place.queue)
            self.retries.extend(job for job in place.running if job not in self.done)

    def assign(self) -> Iterator[tuple[str, Job]]:
        """Hand out samples, each to the least loaded server that may have it, until nobody can take more."""
        able = set(self.places)
        while able:
            server = min(sorted(able), key=lambda name: self.places[name].load)
            job = self._next(server, self.places[server])
            if job is None:
                able.discard(server)
            else:
                self.places[server].running.add(job)
                yield server, job

    def _next(self, server: str, place: _Place) -> Job | None:
        if len(place.running) >= place.limit:
            return None
        for _ in range(len(self.retries)):
            job = self.retries.popleft()
            if job in self.done:
                continue
            if self.avoids.get(job) != server or len(self.places) == 1:
                return job
            self.retries.append(job)
        while place.queue or self.waiting:
            if not place.queue:
                place.queue.extend(self.waiting.popleft())
            job = place.queue.popleft()
            if job not in self.done:
                return job
        return None

    def delivered(self, server: str, job: Job) -> bool:
        """`server` answered. False when the sample had been delivered before: the answer is to be dropped."""
        self._ended(server, job)
        if job in self.done:
            return False
        self.done.add(job)
        return True

    def give_up(self, prompt: int) -> list[Job]:
        """The samples of `prompt` that were not delivered: nobody is asked for them any more, and their answers, if
        they come, are dropped."""
        jobs = [job for job in (Job(prompt, index) for index in range(self.n)) if job not in self.done]
        self.done.update(jobs)
        return jobs

    def failed(self, server: str, job: Job) -> int:
        """`server` failed the sample: it waits for another. Returns how often it has failed by now."""
        place = self.places.get(server)
        known = place is not None and job in place.running
        self._ended(server, job)
        self.avoids[job] = server
        self.failures[job] = self.failures.get(job, 0) + 1
        if known and job not in self.done:  # a server that left handed its jobs over when it did
            self.retries.append(job)
        return self.failures[job]

    def _ended(self, server: str, job: Job) -> None:
        place = self.places.get(server)
        if place is not None:
            place.running.discard(job)
