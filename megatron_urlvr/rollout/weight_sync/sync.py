"""One update of all servers, from the trainer's first rank.

    pause ─► open ─► bucket, ... (the label with the last) ─► finish ─► snapshot for the rest ─► flush ─► continue

Every bucket is written to the snapshot too, behind the scenes: it is what a server reads that missed the update, or
that comes back before the next. A server serves again only when it holds all of the new weights.

Requests may be under way. With `servers.pause: retract` servers put them back, forget what they had computed for them,
and go on with the new weights as if all of it had been a prompt; with `in_place` they go on at once, on what they had
computed with the old weights, and the cache is not flushed.

Colocated servers sleep when this begins, and wake to read the snapshot: see `rollout/sleep.py`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ...config.servers import ServersSection
from ..faults import Fault, RolloutFailed
from ..loop import HttpLoop
from ..patience import Patience
from ..pool import Server, ServerPool
from ..sleep import ASLEEP, WAKING, marker, put_to_sleep, wake
from .buckets import Bucket, buckets
from .snapshot import Snapshots
from .transport import Transport
from .verify import Checksums, read_checksums

ASK_AGAIN_S = 0.5


class WeightSync:
    """Pushes the policy's weights to the servers of a pool. Main thread; HTTP runs on the loop's."""

    def __init__(
        self,
        pool: ServerPool,
        loop: HttpLoop,
        settings: ServersSection,
        *,
        transport: Transport,
        snapshots: Snapshots,
        folder: Path,
        interrupted: Callable[[], bool],
    ) -> None:
        """`folder`: where servers announce themselves, and their supervisors see that they sleep."""
        self.pool, self.loop, self.settings, self.folder = pool, loop, settings, folder
        self.transport, self.snapshots, self.interrupted = transport, snapshots, interrupted
        self.label = ""
        """Label of the newest weights."""
        self.members: list[Server] = []
        self.metrics: dict[str, float] = {}
        self._held_back: Bucket | None = None
        self._problem: Exception | None = None
        self._repairs: dict[int, asyncio.Task[None]] = {}
        self._checksums: Checksums | None = None
        self._limit = settings.bucket_mb << 20
        self._slept = 0.0

    def sleep(self) -> None:
        """Let every server give its memory back. One that is gone holds none; RolloutFailed when another keeps it."""
        started = time.perf_counter()
        self.folder.mkdir(parents=True, exist_ok=True)
        marker(self.folder).touch()
        self.loop.run(self._sleep())  # to its end, signal or not: a server must know what it has given back
        self._slept = time.perf_counter() - started

    async def _sleep(self) -> None:
        self.pool.begin_update()
        if self._repairs:
            await asyncio.wait(self._repairs.values())
        self.pool.discover(self.loop.session)
        servers = list(self.pool.servers.values())
        await asyncio.gather(*(self._sleep_one(server) for server in servers))

    async def _sleep_one(self, server: Server) -> None:
        try:
            await put_to_sleep(server.client, self.settings.sync_timeout_s)
        except Fault as fault:
            self.pool.drop(server, str(fault))
            if fault.kind != "connection":
                raise RolloutFailed(
                    f"servers.colocated: {server.id} did not give its memory back, which the update needs: {fault}"
                ) from fault
        else:
            self.pool.drop(server, "asleep")

    def begin(self, label: str) -> None:
        """Pause every server there is.

        The first time a server is waited for: RolloutFailed when there is none for `wait_s`, Abandoned when asked to
        stop. Later on there may be none: the snapshot is written all the same, so that no step is lost, and
        generation waits for a server to read it.
        """
        started = time.perf_counter()
        before, self.label = self.label, label
        self.members, restarted = self.loop.run(self._assemble(before), self.interrupted)
        self._keep(self._each("/pause_generation", {"mode": self.settings.pause}))
        self.snapshots.begin(label)
        self.transport.open(self.members, restarted=restarted)
        self._held_back, self._problem = None, None
        self._checksums = Checksums() if self.settings.verify else None
        self.metrics = {"sync/seconds_pause": time.perf_counter() - started, "sync/buckets": 0.0, "sync/gb": 0.0}
        if self.settings.colocated:
            self.metrics["sync/seconds_sleep"] = self._slept
        self._sending = time.perf_counter()

    def send(self, stream: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Send a part of the weights. All of `stream` is consumed whatever happens; `end` raises what did."""
        for bucket in buckets(stream, self._limit, packed=self.transport.packs):
            if self._problem is None:
                try:
                    self._send_one(self._held_back, None)
                    self.snapshots.add(bucket)
                    if self._checksums is not None:
                        self._checksums.add(bucket)
                except OSError as error:
                    self._problem = error
            self._held_back = bucket

    def _send_one(self, bucket: Bucket | None, label: str | None) -> None:
        if bucket is not None:
            self.transport.send(bucket, label)
            self.metrics["sync/buckets"] += 1
            self.metrics["sync/gb"] += bucket.size / 1e9

    def end(self) -> None:
        """The servers that hold the new weights serve again; the others stay fenced. RolloutFailed when the snapshot
        could not be written."""
        self._send_one(self._held_back, self.label)
        self._held_back = None
        carried = self.transport.finish()
        self.metrics["sync/seconds_send"] = time.perf_counter() - self._sending
        self.metrics["sync/gb_per_s"] = self.metrics["sync/gb"] / self.metrics["sync/seconds_send"]
        started = time.perf_counter()
        if self._problem is not None:
            raise RolloutFailed(f"servers.snapshot_dir: the weights could not be written: {self._problem}")
        ready = self.snapshots.commit()
        if len(carried) < len(self.members):
            try:
                ready.result()
            except OSError as error:
                raise RolloutFailed(f"servers.snapshot_dir: the weights could not be written: {error}") from error
        marker(self.folder).unlink(missing_ok=True)
        self.loop.run(self._resume({id(server) for server in carried}))
        self.metrics["sync/seconds_resume"] = time.perf_counter() - started
        self.metrics["sync/servers"] = float(len(self.members))
        if self._checksums is not None:
            self._verify(self._checksums)

    def _verify(self, sent: Checksums) -> None:
        """Hold the servers' checksums against the policy's, or against each other where they hash otherwise than here.
        RolloutFailed when weights did not arrive as they were sent."""
        started = time.perf_counter()
        members = [server for server in self.members if server.state == "up"]
        found = self.loop.run(self._checksums_of(members))
        for server, ranks in zip(members, found, strict=True):
            if self.settings.policy.device == "cpu" and server.tp == 1:
                wrong, whose = sent.wrong(ranks[0]), "the policy"
            else:
                wrong = sorted(
                    {name for a, b in zip(found[0], ranks, strict=False) for name in a if a[name] != b.get(name)}
                )
                whose = members[0].id
            if wrong:
                raise RolloutFailed(
                    f"servers.verify: after the update to {self.label} {server.id} and {whose} differ in {len(wrong)}"
                    f" tensors, {wrong[0]} among them; try servers.transport=disk, and look for another SGLang"
                )
        self.metrics["sync/verified"] = float(len(members))
        self.metrics["sync/seconds_verify"] = time.perf_counter() - started

    async def _checksums_of(self, servers: Sequence[Server]) -> list[list[dict[str, str]]]:
        limit, body = self.settings.sync_timeout_s, {"action": "checksum"}
        try:
            answers = await asyncio.gather(*(s.client.call("/weights_checker", body, timeout=limit) for s in servers))
            return [read_checksums(answer) for answer in answers]
        except (Fault, ValueError) as problem:
            raise RolloutFailed(f"servers.verify: a server gave no checksums of its weights: {problem}") from problem

    # -- on the loop's thread -----------------------------------------------------------------------------------------

    async def _assemble(self, before: str) -> tuple[list[Server], bool]:
        """(Servers that answer, whether one of them is not as the last update left it)."""
        loop = asyncio.get_running_loop()
        patience = Patience(self.settings.wait_s)
        self.pool.begin_update()
        if self._repairs:  # a server must not read the old snapshot in the middle of the update
            await asyncio.wait(self._repairs.values())
        while True:
            self.pool.discover(self.loop.session)
            servers = list(self.pool.servers.values())
            held = await asyncio.gather(*(self._label(server) for server in servers))
            there = [server for server, label in zip(servers, held, strict=True) if label is not None]
            if there or before:
                return there, any(label not in (None, before) for label in held)
            patience.missing(loop.time(), self.pool.summary())
            await asyncio.sleep(ASK_AGAIN_S)

    async def _label(self, server: Server) -> str | None:
        try:
            label = await server.client.label(self.settings.health_timeout_s)
        except Fault as fault:
            self.pool.drop(server, str(fault))
            return None
        if problem := self._beyond_waking(label):
            self.pool.drop(server, problem)
            return None
        return label

    def _beyond_waking(self, label: str) -> str | None:
        """Why a server without all of its memory stays out: what became of it is not known, or not this run's doing."""
        if label == WAKING or (label == ASLEEP and not self.settings.colocated):
            return f"its label is {label!r}: a trainer left it without memory for weights or cache; start it again"
        return None

    async def _resume(self, carried: set[int]) -> None:
        await asyncio.gather(*(self._resume_one(server, id(server) in carried) for server in self.members))

    async def _resume_one(self, server: Server, carried: bool) -> None:
        limit, flush = self.settings.sync_timeout_s, self.settings.pause == "retract"
        try:
            if not carried:
                await self._bring_up(server, flush=flush)
            else:
                if flush:
                    await server.client.flush_cache(limit)
                await server.client.command("/continue_generation", timeout=limit)
            held = await server.client.label(self.settings.health_timeout_s)
        except Fault as fault:
            self.pool.drop(server, str(fault))
            return
        if held == self.label:
            self.pool.admit(server)
        else:
            self.pool.drop(server, f"fenced: it holds the weights {held} after an update to {self.label}")

    async def repair(self, server: Server) -> None:
        """Let a server read the newest snapshot, between updates. Fault when it does not.

        It goes on to its end when its caller is cancelled: what a server has been told cannot be taken back.
        """
        if self.pool.updating:
            raise Fault("version", "new weights are on their way")
        work = self._repairs.get(id(server))
        if work is None:
            work = self._repairs[id(server)] = asyncio.get_running_loop().create_task(self._repair(server))
            work.add_done_callback(lambda done: self._repaired(server, done))
        await asyncio.shield(work)

    def _repaired(self, server: Server, work: asyncio.Task[None]) -> None:
        del self._repairs[id(server)]
        if not work.cancelled():
            work.exception()  # who asked for it was told; if nobody waits any more, nobody need be

    async def _repair(self, server: Server) -> None:
        limit = self.settings.sync_timeout_s
        held = await server.client.label(self.settings.health_timeout_s)
        if problem := self._beyond_waking(held):
            raise Fault("version", problem)
        # Requests that were given up may still run there, and keep it from flushing its cache.
        await server.client.command("/pause_generation", {"mode": "retract"}, timeout=limit)
        await self._bring_up(server, flush=True)

    async def _bring_up(self, server: Server, *, flush: bool) -> None:
        """Let a paused server read the newest snapshot and go on, awake or asleep. Fault when it does not."""
        limit = self.settings.sync_timeout_s
        if self.settings.colocated and await server.client.label(self.settings.health_timeout_s) == ASLEEP:
            await wake(server.client, lambda: self._read(server, WAKING, flush=False), self.label, limit)
            return
        await self._read(server, self.label, flush=flush)
        await server.client.command("/continue_generation", timeout=limit)

    async def _read(self, server: Server, label: str, *, flush: bool) -> None:
        """Let a server read the newest snapshot, and call it `label`. Fault when it does not."""
        if self.snapshots.ready is None:
            raise Fault("version", "there are no weights to give it yet")
        try:
            folder = await asyncio.wrap_future(self.snapshots.ready)
        except OSError as error:
            raise Fault("version", f"the snapshot could not be written: {error}") from error
        body = {"model_path": str(folder), "weight_version": label, "flush_cache": flush}
        await server.client.command("/update_weights_from_disk", body, timeout=self.settings.sync_timeout_s)

    def _each(self, path: str, body: dict[str, Any]) -> Coroutine[Any, Any, list[Server]]:
        async def one(server: Server) -> bool:
            try:
                await server.client.command(path, body, timeout=self.settings.sync_timeout_s)
            except Fault as fault:
                self.pool.drop(server, str(fault))
                return False
            return True

        async def every() -> list[Server]:
            good = await asyncio.gather(*(one(server) for server in self.members))
            return [server for server, fine in zip(self.members, good, strict=True) if fine]

        return every()

    def _keep(self, work: Coroutine[Any, Any, Sequence[Server]]) -> None:
        self.members = list(self.loop.run(work))

    def close(self) -> None:
        """Leave the group, remove the snapshots."""
        self.transport.close()
        self.snapshots.close()
