"""Weights over a process group: NCCL between GPUs, gloo on a CPU.

A server joins a broadcast only when it has understood the HTTP call that announces it; one that has not leaves the
trainer alone in the broadcast until the group's time-out. So every answer is watched while the broadcast runs, a
refusal ends it at once, and the time-outs are short.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from ...exit_codes import UnusableInput
from ..faults import Fault
from ..loop import HttpLoop
from ..pool import Server
from .buckets import Bucket
from .process_group import Rendezvous, abort, broadcast
from .transport import Transport


class GroupFailed(RuntimeError):  # noqa: N818 - says what happened
    """The group cannot carry this update. The message is a sentence."""


class GroupTransport(Transport):
    """Broadcasts buckets from the trainer's first rank."""

    def __init__(self, loop: HttpLoop, *, device: torch.device, session: str, timeout_s: float) -> None:
        """`session` names the trainer's process in group names; `timeout_s` bounds every step."""
        self.loop, self.device, self.session, self.timeout_s = loop, device, session, timeout_s
        self.backend = "nccl" if device.type == "cuda" else "gloo"
        self.packs = self.backend == "nccl"
        self.epoch = 0
        self.members: list[Server] = []
        self.joined: tuple[tuple[str, str], ...] = ()
        """Incarnations of the servers in the group; empty without one."""
        self.group: Any = None
        self.failure: str | None = None
        self._pending: tuple[list[Any], list[Future[Any]], Bucket] | None = None
        self._given_up: list[Any] = []
        """gloo groups whose broadcast nobody joined: destroyed, they would wait for it."""

    @property
    def name(self) -> str:
        """Name of the group. The epoch in it keeps apart what was before servers came or went."""
        return f"urlvr-{self.session}-{self.epoch}"

    def open(self, members: Sequence[Server], *, restarted: bool) -> None:
        """Make a new group when membership changed, and tell servers that an update begins.

        UnusableInput when trainer and servers have different NCCLs.
        """
        self.members, self.failure = list(members), None if members else "there is no server"
        if not members:
            return
        wanted = tuple(server.incarnation for server in members)
        try:
            if restarted or wanted != self.joined:
                self._dissolve()
                self._form(wanted)
            self._all("/begin_weight_update", {})
        except GroupFailed as error:
            self._fail(str(error))

    def _form(self, incarnations: tuple[tuple[str, str], ...]) -> None:
        self.epoch += 1
        self._same_nccl()
        hosts = [urlsplit(server.client.url).hostname or "" for server in self.members]
        meeting = Rendezvous(hosts, self.timeout_s)
        world, answers = 1, []
        for server in self.members:
            body = {
                "master_address": meeting.host,
                "master_port": meeting.port,
                "rank_offset": world,
                "group_name": self.name,
                "backend": self.backend,
            }
            world += server.tp
            answers.append((server, body))
        futures = [
            self._post(server, "/init_weights_update_group", body | {"world_size": world}) for server, body in answers
        ]
        try:
            self.group = meeting.group(self.name, world, self.backend)
        except RuntimeError as error:
            self._settled(futures)  # what a server said tells more than the time-out
            raise GroupFailed(f"servers did not join the group within {self.timeout_s:g} s: {error}") from error
        self._settled(futures)
        self.joined = incarnations

    def _same_nccl(self) -> None:
        if self.backend != "nccl":
            return
        mine = ".".join(map(str, torch.cuda.nccl.version()))
        for server in self.members:
            theirs = server.announced.nccl if server.announced else ""
            if theirs and theirs != mine:
                raise UnusableInput(
                    f"servers.transport = group: NCCL {mine} here and {theirs} on {server.id} may not understand each"
                    " other; install the same in both environments, or set servers.transport=disk."
                )

    def send(self, bucket: Bucket, label: str | None) -> None:
        """Broadcast a bucket; the one before has arrived when this returns."""
        if self.failure is not None:
            return
        try:
            self._drain()
            body = bucket.request() | {"group_name": self.name, "flush_cache": False, "abort_all_requests": False}
            if label is not None:
                body["weight_version"] = label
            futures = [self._post(server, "/update_weights_from_distributed", body) for server in self.members]
            self._pending = ([broadcast(self.group, each) for each in bucket.tensors()], futures, bucket)
        except (GroupFailed, RuntimeError) as error:
            self._fail(str(error))

    def finish(self) -> list[Server]:
        """Wait for the last bucket and close the update."""
        if self.failure is None:
            try:
                self._drain()
                self._all("/end_weight_update", {})
            except (GroupFailed, RuntimeError) as error:
                self._fail(str(error))
        return [] if self.failure is not None else list(self.members)

    def _drain(self) -> None:
        """The bucket on its way has arrived everywhere. GroupFailed when a server refused or fell silent."""
        if self._pending is None:
            return
        works, futures, _ = self._pending
        self._settled(futures)
        self._pending = None
        for work in works:
            work.wait()

    def _fail(self, why: str) -> None:
        """Give up the group: this update, and the next one gets a new epoch."""
        self.failure = why
        print(f"weights could not be broadcast ({why}); servers read the snapshot instead", file=sys.stderr, flush=True)
        self._leave_broadcast()
        # A server inside an update refuses the next; whether it is inside is not known here.
        self._quietly("/end_weight_update", {})
        self._dissolve()

    def _leave_broadcast(self) -> None:
        """Give up the group if its last broadcast has not arrived everywhere. Servers inside are let go with that."""
        if self.group is None or self._pending is None:
            return
        if self.backend == "nccl":  # it would spin on the device, and whatever waits for the device with it
            abort(self.group)
        else:
            self._given_up.append((self.group, self._pending))
        self.group, self._pending = None, None

    def _dissolve(self) -> None:
        self._leave_broadcast()
        if self.joined or self.group is not None:
            self._quietly("/destroy_weights_update_group", {"group_name": self.name})
        if self.group is not None:
            dist.destroy_process_group(self.group)
        self.group, self.joined = None, ()

    def close(self) -> None:
        """Leave the group."""
        self._dissolve()

    # -- calls --------------------------------------------------------------------------------------------------------

    def _post(self, server: Server, path: str, body: dict[str, Any]) -> Future[Any]:
        return self.loop.submit(server.client.command(path, body, timeout=self.timeout_s))

    def _all(self, path: str, body: dict[str, Any]) -> None:
        self._settled([self._post(server, path, body) for server in self.members])

    def _quietly(self, path: str, body: dict[str, Any]) -> None:
        wait([self._post(server, path, body) for server in self.members], timeout=self.timeout_s)

    def _settled(self, futures: Sequence[Future[Any]]) -> None:
        done, late = wait(futures, timeout=self.timeout_s, return_when=FIRST_EXCEPTION)
        for future in done:
            fault = future.exception()
            if isinstance(fault, Fault):
                raise GroupFailed(str(fault)) from fault
            if fault is not None:
                raise fault
        if late:
            raise GroupFailed(f"{len(late)} of {len(futures)} servers did not answer within {self.timeout_s:g} s")
