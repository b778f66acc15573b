"""The servers of one pool: who is there, who may be asked, who is fenced.

Whether a server may be asked is never a matter of bookkeeping: it is asked which weights it holds. Weights carry a
label that names the trainer's process and their version; a server with another label (just started, updated by somebody
else, left behind) is *fenced* until it is brought up to date.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import aiohttp

from ..config.servers import PoolSection, ServersSection
from .announcements import Announcement, read_announcements
from .client import ServerClient
from .faults import Fault

State = Literal["up", "out"]
PROBE_S = (0.5, 30.0)
"""A server that is out is probed again after so long; the pause doubles up to the second figure."""
STRIKES = 8
"""Faults in a row after which a server leaves the pool, healthy or not."""


@dataclass
class Server:
    """One server as the trainer knows it."""

    id: str
    client: ServerClient
    announced: Announcement | None = None
    state: State = "out"
    why: str = "not asked yet"
    """Why it is out."""
    strikes: int = 0
    probe_at: float = 0.0
    """Loop time of the next probe while it is out."""
    pause: float = field(default_factory=lambda: PROBE_S[0])
    heard: float = 0.0
    """Loop time of its last good answer."""
    probing: bool = field(default=False, repr=False)
    busy: int = 0
    """Requests of this replica that it works on."""

    @property
    def tp(self) -> int:
        """Ranks it joins a weight group with."""
        return self.announced.tp if self.announced else 1

    @property
    def incarnation(self) -> tuple[str, str]:
        """Tells a server from the one that took its place."""
        return self.client.url, self.announced.started if self.announced else ""


@dataclass(frozen=True)
class ServerHealth:
    """One server's state in words, for `RolloutEngine.health`."""

    id: str
    url: str
    up: bool
    why: str


class ServerPool:
    """Membership. Every method runs on the event loop's thread."""

    def __init__(self, pool: PoolSection, servers: ServersSection, folder: Path, *, name: str) -> None:
        """`folder`: where servers announce themselves, read when the pool lists no URLs."""
        self.pool, self.settings, self.folder, self.name = pool, servers, folder, name
        self.servers: dict[str, Server] = {}
        self.updating = False
        """Weights are being handed over: nobody is asked, probed or judged until that is over."""
        self.updates = 0
        """Updates begun so far."""
        self.waiting: list[asyncio.Event] = []
        """What is set when servers may take more, in order of urgency."""
        self._complained: set[str] = set()

    def stir(self) -> None:
        """Somebody may be asked again: let all who wait look, the most urgent first."""
        for event in self.waiting:
            event.set()

    def begin_update(self) -> None:
        """Weights are about to be handed over."""
        self.updating = True
        self.updates += 1

    def end_update(self) -> None:
        """That is over."""
        self.updating = False
        self.stir()

    async def verify(self, label: str) -> None:
        """Ask every server which weights it holds: those with `label` may be asked, the others are out."""

        async def one(server: Server) -> None:
            try:
                held = await server.client.label(self.settings.health_timeout_s)
            except Fault as fault:
                self.drop(server, str(fault))
                return
            if held == label:
                self.admit(server)
            else:
                self.drop(server, f"fenced: it holds the weights {held}, wanted are {label}")

        await asyncio.gather(*(one(server) for server in self.servers.values()))

    def discover(self, session: aiohttp.ClientSession) -> None:
        """Take in servers that appeared, let go of those that withdrew or were replaced."""
        wanted = self._wanted()
        for known in [name for name in self.servers if name not in wanted]:
            del self.servers[known]
        for name, (url, announced) in wanted.items():
            known_server = self.servers.get(name)
            if known_server is None or known_server.announced != announced:
                client = ServerClient(session, url)
                self.servers[name] = Server(name, client, announced)

    def _wanted(self) -> dict[str, tuple[str, Announcement | None]]:
        if self.pool.urls:
            return {url: (url, None) for url in self.pool.urls}
        found, problems = read_announcements(self.folder, self.settings.hosts)
        for problem in problems:
            if problem not in self._complained:
                self._complained.add(problem)
                print(problem, file=sys.stderr, flush=True)
        return {item.id: (item.url, item) for item in found if item.pool == self.name}

    def up(self) -> list[Server]:
        """Servers that may be asked."""
        return [server for server in self.servers.values() if server.state == "up"]

    def admit(self, server: Server) -> None:
        """`server` holds the right weights and answers."""
        server.state, server.why, server.strikes = "up", "", 0
        # Only a good answer shortens the pause: a server that is healthy and fails its requests is asked ever less.
        server.heard = asyncio.get_running_loop().time()

    def drop(self, server: Server, why: str) -> None:
        """`server` leaves the pool until a probe succeeds. Of the many requests that fail with a server the first one
        decides when it is probed."""
        server.why = why
        if server.state == "out" and not server.probing:
            return
        server.state = "out"
        server.probe_at = asyncio.get_running_loop().time() + server.pause
        server.pause = min(2 * server.pause, PROBE_S[1])

    def good(self, server: Server) -> None:
        """It gave a good answer."""
        server.strikes, server.pause = 0, PROBE_S[0]
        server.heard = asyncio.get_running_loop().time()

    def strike(self, server: Server, fault: Fault) -> None:
        """It failed a request. Gone at once when nobody is there or its weights are wrong; else after several."""
        server.strikes += 1
        if fault.kind in ("connection", "version") or server.strikes >= STRIKES:
            self.drop(server, str(fault))

    async def probe(
        self, server: Server, label: str, repair: Callable[[Server], Awaitable[None]] | None = None
    ) -> None:
        """Ask a server that is out whether it may come back. `repair` brings one with other weights up to date;
        without it such a server stays fenced. Never raises Fault."""
        if server.probing:
            return
        server.probing, updates = True, self.updates
        try:
            held = await server.client.label(self.settings.health_timeout_s)
            if held != label and repair is not None:
                await repair(server)
                held = await server.client.label(self.settings.health_timeout_s)
            if held != label:
                self.drop(server, f"fenced: it holds the weights {held}, wanted are {label}")
                return
            await server.client.check_health(self.settings.health_timeout_s)
            if self.updates != updates:
                self.drop(server, "weights were updated while it came back")
                return
            self.admit(server)
        except Fault as fault:
            self.drop(server, str(fault))
        finally:
            server.probing = False

    def describe(self) -> list[ServerHealth]:
        """Every server's state."""
        return [ServerHealth(s.id, s.client.url, s.state == "up", s.why) for s in self.servers.values()]

    def summary(self) -> str:
        """All servers in one line."""
        if not self.servers:
            where = "servers.pools." + self.name + ".urls" if self.pool.urls else str(self.folder)
            return f"no server is announced in {where}"
        return "; ".join(f"{s.id}: {'up' if s.state == 'up' else s.why}" for s in self.servers.values())


def in_need(servers: Sequence[Server], now: float) -> list[Server]:
    """Servers that are out and due for a probe."""
    return [s for s in servers if s.state == "out" and not s.probing and s.probe_at <= now]
