"""One batch of prompts, asked of a pool of servers until every sample is there, or nobody is left to ask.

schedule ─► request ─► answer checked ─► delivered ─► group complete ─► handed over
               └─ fault, counted ─► asked elsewhere          watch: probes, health, starvation

Batches may run side by side: they share each server's limit, the more urgent one first. While weights are updated
nobody is asked, and what servers were asked before goes on afterwards with the new weights. What a server had generated
of a response when it gave it up is kept: the next request asks for the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from ..config.servers import ServersSection
from ..types import Prompt, Sampling
from .answers import Answer, Expected, read_answer
from .client import ServerClient
from .early import EarlyVotes, decided
from .faults import Aborted, Fault, FaultCounts, RolloutFailed
from .patience import Patience
from .pool import Server, ServerPool, in_need
from .schedule import Job, Schedule
from .versions import Versions

TICK_S = 0.25

_requests = itertools.count()
"""Numbers requests of this process: an id is never used twice, also when a sample is asked for again."""


@dataclass(frozen=True)
class Model:
    """What the servers serve, as far as answers are checked against it."""

    vocab_size: int
    stop_ids: frozenset[int]
    statistics: tuple[str, ...] = ()


class Dispatch:
    """The requests of one `generate` call. Runs on the event loop's thread."""

    def __init__(
        self,
        pool: ServerPool,
        session: aiohttp.ClientSession,
        settings: ServersSection,
        *,
        model: Model,
        versions: Versions,
        limit: int,
        faults: FaultCounts,
        repair: Callable[[Server], Awaitable[None]] | None,
        emit: Callable[[int, list[Answer]], None],
        votes: EarlyVotes | None = None,
    ) -> None:
        """`versions`: what the weights are called; tokens may come from those of now or newer ones. `limit`: requests
        this replica may have on one server; `emit` gets each prompt's position and answers, in sample order, once."""
        self.pool, self.session, self.settings = pool, session, settings
        self.model, self.versions, self.limit, self.faults = model, versions, limit, faults
        self.oldest = versions.served
        self.repair, self.emit, self.votes = repair, emit, votes
        router = settings.policy.router
        self.router = None if router is None else ServerClient(session, router)
        self.requests: dict[Job, tuple[Server, str]] = {}
        """Where a sample is being generated, and under which id."""
        self.aborts: set[asyncio.Task[None]] = set()
        self.wake = asyncio.Event()
        self.tasks: set[asyncio.Task[None]] = set()
        self.error: BaseException | None = None
        self.patience = Patience(settings.wait_s)

    async def run(self, prompts: Sequence[Prompt], sampling: Sampling, *, ahead: bool = False) -> None:
        """Until every group was emitted. `ahead`: less urgent than the batches that run already; otherwise more.
        RolloutFailed when no server is left for `wait_s`."""
        self.prompts, self.sampling = prompts, sampling
        self.schedule = Schedule(len(prompts), sampling.n)
        self.found: list[dict[int, Answer]] = [{} for _ in prompts]
        self.tallies: list[Counter[str]] = [Counter() for _ in prompts]
        self.begun: dict[Job, Answer] = {}
        for server in self.pool.up():
            server.heard = asyncio.get_running_loop().time()
        self.pool.waiting.insert(len(self.pool.waiting) if ahead else 0, self.wake)
        self._spawn(self._watch())
        try:
            while not self.schedule.finished:
                if self.error is not None:
                    raise self.error
                self._assign()
                self.wake.clear()
                await self.wake.wait()
            if self.aborts:
                await asyncio.wait(self.aborts)
        finally:
            self.pool.waiting.remove(self.wake)
            for task in self.tasks:
                task.cancel()
            await asyncio.gather(*self.tasks, return_exceptions=True)
            self.pool.stir()

    def _spawn(self, work: Any, server: Server | None = None) -> None:
        """Start `work`; a request to `server` counts as its own until it ends."""
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        if server is not None:
            server.busy += 1
        task.add_done_callback(lambda task: self._ended(task, server))

    def _ended(self, task: asyncio.Task[None], server: Server | None) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and task.exception() is not None and self.error is None:
            self.error = task.exception()
        self.wake.set()
        if server is not None:
            server.busy -= 1
            self.pool.stir()

    def _assign(self) -> None:
        """Give every server that may be asked what it can take."""
        if self.pool.updating:
            return
        up = {server.id: server for server in self.pool.up()}
        for name in [name for name in self.schedule.places if name not in up]:
            self.schedule.leave(name)
        for name, server in up.items():
            others = server.busy - self.schedule.running_on(name)
            self.schedule.join(name, max(0, self.limit - others))
        for name, job in list(self.schedule.assign()):
            self._spawn(self._ask(up[name], job), up[name])

    # -- one request --------------------------------------------------------------------------------------------------

    async def _ask(self, server: Server, job: Job) -> None:
        prompt, begun = self.prompts[job.prompt], self.begun.get(job)
        ids = [*prompt.tokens, *(begun.tokens if begun else ())]
        longest = self.sampling.max_new_tokens - (len(begun.tokens) if begun else 0)
        request = f"{self.versions.label}/{prompt.id}/{job.index}/{next(_requests)}"
        self.requests[job] = server, request
        # What failed on the way through the router is asked of the server itself.
        routed = self.router is not None and job not in self.schedule.failures
        client = self.router if self.router is not None and routed else server.client
        try:
            body = self._body(ids, longest, request)
            payload = await client.call("/generate", body, timeout=self.settings.timeout_s)
            answer = read_answer(payload, self._expected(len(ids), longest, request)).after(begun)
        except Fault as fault:
            if job in self.schedule.done:  # given up, or delivered by another server meanwhile
                self.schedule.delivered(server.id, job)
                return
            if isinstance(fault, Aborted) and fault.beginning is not None:
                self._go_on_from(job, fault.beginning.after(begun))
            self._failed(server, job, fault, blame=not routed)
            return
        if not routed:
            self.pool.good(server)
        self.patience.found()
        if self.schedule.delivered(server.id, job):
            self._keep(job, answer)

    def _go_on_from(self, job: Job, beginning: Answer) -> None:
        known = self.begun.get(job)
        if known is None or len(known.tokens) < len(beginning.tokens):
            self.begun[job] = beginning
            self.faults.kept(len(beginning.tokens) - (len(known.tokens) if known else 0))

    def _body(self, ids: list[int], longest: int, request: str) -> dict[str, Any]:
        body = {
            "input_ids": ids,
            "rid": request,
            "return_logprob": True,
            "sampling_params": {
                "max_new_tokens": longest,
                "temperature": self.sampling.temperature,
                "top_p": self.sampling.top_p,
                "stop_token_ids": sorted(self.model.stop_ids),
            },
        }
        if self.settings.pause == "in_place":
            # Updates leave the cache as it is: what older weights computed is kept out of reach of newer ones.
            body["extra_key"] = self.versions.label
        return body

    def _expected(self, sent: int, longest: int, request: str) -> Expected:
        return Expected(
            request=request,
            prompt_tokens=sent,
            max_new_tokens=longest,
            vocab_size=self.model.vocab_size,
            stop_ids=self.model.stop_ids,
            versions=self.versions.since(self.oldest),
            statistics=self.model.statistics,
        )

    def _failed(self, server: Server, job: Job, fault: Fault, *, blame: bool = True) -> None:
        """`blame`: it was the server, and not a router before it."""
        self.faults.add(fault)
        if blame and self.pool.servers.get(server.id) is server:
            self.pool.strike(server, fault)
        times = self.schedule.failed(server.id, job)
        if times >= self.settings.attempts:
            prompt = self.prompts[job.prompt]
            raise RolloutFailed(
                f"sample {job.index} of prompt {prompt.id!r} failed {times} times (servers.attempts), last on"
                f" {server.id}: {fault}"
            )

    def _keep(self, job: Job, answer: Answer) -> None:
        group = self.found[job.prompt]
        group[job.index] = answer
        if len(group) == self.sampling.n or self._decided(job, answer):
            self.emit(job.prompt, [group[index] for index in sorted(group)])

    def _decided(self, job: Job, answer: Answer) -> bool:
        """Whether the rest of the prompt's votes is not needed; then it is given up."""
        group, certain = self.found[job.prompt], self.sampling.certain
        if certain is None or self.votes is None:
            return False
        if (vote := self.votes.read(answer)) is not None:
            self.tallies[job.prompt][vote] += 1
        if any(index not in group for index in range(certain)):
            return False  # of those that are trained on none is left out: the short ones come first
        missing = self.sampling.n - len(group)
        if not decided(self.tallies[job.prompt], missing, exact=self.votes.exact):
            return False
        for each in self.schedule.give_up(job.prompt):
            if each in self.requests:
                server, request = self.requests[each]
                for one in [server] if self.router is None else self.pool.up():  # a router tells nobody whom it asked
                    self.aborts.add(asyncio.get_running_loop().create_task(self._abort(one, request)))
        self.votes.gave_up(missing, [len(each.tokens) for each in group.values()])
        return True

    async def _abort(self, server: Server, request: str) -> None:
        with contextlib.suppress(Fault):  # it has ended by itself, or the server is gone
            await server.client.command("/abort_request", {"rid": request}, timeout=self.settings.health_timeout_s)

    # -- beside the requests ------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Find servers that come back, ask silent ones how they are, and notice when there are none."""
        while True:
            now = asyncio.get_running_loop().time()
            if self.pool.updating:
                self.patience.found()
            else:
                self._look_around(now)
            await asyncio.sleep(TICK_S)

    def _look_around(self, now: float) -> None:
        """One look at all servers. RolloutFailed when there were none for too long."""
        self.pool.discover(self.session)
        for server in in_need(list(self.pool.servers.values()), now):
            self._spawn(self.pool.probe(server, self.versions.label, self.repair))
        for server in self.pool.up():
            quiet = now - server.heard > self.settings.health_every_s
            if quiet and not server.probing and self.schedule.running_on(server.id):
                self._spawn(self._check(server))
        if self.pool.up():
            self.wake.set()
        else:
            self.patience.missing(now, self.pool.summary())

    async def _check(self, server: Server) -> None:
        """Health of a server that owes answers. Out of the pool when it fails: what it has is asked for elsewhere."""
        server.probing, updates = True, self.pool.updates
        try:
            await server.client.check_health(self.settings.health_timeout_s)
            server.heard = asyncio.get_running_loop().time()
        except Fault as fault:
            if self.pool.updates == updates:  # one that was paused for an update cannot generate
                self.faults.add(fault)
                self.pool.drop(server, f"health: {fault}")
        finally:
            server.probing = False
