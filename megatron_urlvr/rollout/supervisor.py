"""Starts SGLang servers, announces them when they can generate, and starts them again when they end or fall silent.

One supervisor a host. Each server is the leader of a process group of its own: whatever it started goes when it goes,
and nothing else is ever signalled.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import IO

import aiohttp

from ..config.addresses import api_key, key_problem
from ..config.root import Config
from ..config.servers import POLICY, PoolSection, ServersSection
from ..exit_codes import ExitCode, UnusableInput
from ..rewards.combine import build_terms
from ..run.folder import RunDir
from ..types import STATISTICS
from .announcements import Announcement, announce, withdraw
from .client import ServerClient
from .faults import Fault
from .launch_server import Environment, examine, model_context, server_command, server_environment
from .plugin import plugin_environment
from .sleep import ASLEEP, marker

LOOK_S = 0.2
"""How often processes, health at the start, and the end of the run are looked at."""
GRACE_S = 10.0
"""From SIGTERM to SIGKILL."""
BACK_OFF_S = (1.0, 60.0)
"""Pause before a restart; doubles up to the second figure, and starts anew after a server that lived so long."""
HOPELESS = 3
"""A server that ended so often before it was ever ready will not start by itself."""
LOG_LINES = 15


class ServerFailed(Exception):  # noqa: N818 - the server did, not the supervisor
    """A server cannot be started. The message is a sentence with the end of its log."""


@dataclass(frozen=True)
class Plan:
    """What all servers of one pool on this host have in common."""

    pool: PoolSection
    settings: ServersSection
    environment: Environment
    name: str
    model: str
    folder: Path
    statistics: tuple[str, ...] = ()
    """Token statistics that the servers are to give."""
    dtype: str = "auto"
    """What servers on a GPU compute in: the policy's, as the trainer does."""

    @property
    def sleeps(self) -> bool:
        """Whether the trainer takes the servers' memory in turns."""
        return self.settings.colocated and self.name == POLICY

    @property
    def asleep(self) -> bool:
        """Whether it has it now: then servers cannot be asked how they are, and there is no memory for a new one."""
        return self.sleeps and marker(self.folder).exists()


async def serve(config: Config, name: str) -> int:
    """Run the servers of pool `name` until a signal or the run's DONE. Returns the exit code."""
    plan, run = make_plan(config, name), RunDir(config.run.dir)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    key = api_key(plan.settings.api_key_env)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with _key_file(key) as key_file:
        async with aiohttp.ClientSession(headers=headers) as session:
            servers = [
                SupervisedServer(plan, index, session, stop, key=key, key_file=key_file)
                for index in range(plan.pool.count)
            ]
            tasks = [asyncio.create_task(server.run()) for server in servers]
            tasks.append(asyncio.create_task(_until_done(run, stop)))
            try:
                await asyncio.gather(*tasks)
            except ServerFailed as failure:
                print(failure, file=sys.stderr, flush=True)
                return int(ExitCode.FAILED)
            finally:
                stop.set()
                await asyncio.gather(*tasks, return_exceptions=True)
    return int(ExitCode.DONE)


def make_plan(config: Config, name: str) -> Plan:
    """Everything that is checked before a server starts. UnusableInput says what is missing."""
    pools = config.servers.pools
    if name not in pools:
        raise UnusableInput(f"--pool {name}: servers.pools has {', '.join(sorted(pools))}.")
    pool = pools[name]
    if pool.urls:
        raise UnusableInput(f"servers.pools.{name}.urls names servers that run already: there is nothing to start.")
    if problem := key_problem(pool.host, config.servers.api_key_env):
        raise UnusableInput(f"servers.pools.{name}.host: {problem}.")
    model = pool.model or config.model.path
    model_context(model)
    environment = examine(pool, os.environ)
    folder = RunDir(config.run.dir).servers
    if name != POLICY:
        return Plan(pool, config.servers, environment, name, model, folder)
    dtype = "bfloat16" if config.model.dtype == "auto" else config.model.dtype
    return Plan(pool, config.servers, environment, name, model, folder, server_statistics(config), dtype)


def server_statistics(config: Config) -> tuple[str, ...]:
    """Token statistics that servers compute for the rewards of `config`; none unless `reward.statistics` says so."""
    if config.reward.statistics != "servers":
        return ()
    terms = build_terms(config.reward, advantage=config.algorithm.advantage, seed=config.run.seed)
    return tuple(sorted(terms.needs & STATISTICS))


async def _until_done(run: RunDir, stop: asyncio.Event) -> None:
    """Set `stop` when the run is over. A DONE from before belongs to a run that is being continued."""
    began = time.time()
    while not stop.is_set():
        with contextlib.suppress(FileNotFoundError):
            if run.done.stat().st_mtime >= began:
                print(f"{run.path} is done", flush=True)
                stop.set()
        await _pause(stop, 1.0)


async def _pause(stop: asyncio.Event, seconds: float) -> None:
    """Sleep, but not through `stop`."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), seconds)


@contextlib.contextmanager
def _key_file(key: str | None) -> Iterator[Path | None]:
    """The API key in a file for SGLang's --config: only this user can read it, and it goes when the servers go."""
    if key is None:
        yield None
        return
    handle, name = tempfile.mkstemp(prefix="urlvr-", suffix=".yaml")  # mode 0600
    try:
        with os.fdopen(handle, "w") as file:
            file.write(f"api-key: {key!r}\n")
        yield Path(name)
    finally:
        os.unlink(name)


def _copy_without(secret: bytes, source: IO[bytes] | None, log: Path) -> None:
    """Append all that a server says to its log, but for the API key: SGLang prints its arguments when it starts."""
    assert source is not None
    with source, log.open("ab") as file:
        for line in source:
            file.write(line.replace(secret, b"(API key)"))
            file.flush()


class SupervisedServer:
    """One server, through all its restarts."""

    def __init__(
        self,
        plan: Plan,
        index: int,
        session: aiohttp.ClientSession,
        stop: asyncio.Event,
        *,
        key: str | None = None,
        key_file: Path | None = None,
    ) -> None:
        self.plan, self.index, self.session, self.stop = plan, index, session, stop
        self.key, self.key_file = key, key_file
        self.id = f"{plan.name}-{socket.gethostname().split('.')[0]}-{index}"
        self.log = plan.folder / f"{self.id}.log"
        self.process: subprocess.Popen[bytes] | None = None

    async def run(self) -> None:
        """Until `stop`. ServerFailed when it ends again and again before it was ready."""
        pause, stillborn = BACK_OFF_S[0], 0
        try:
            while not self.stop.is_set():
                started = time.monotonic()
                client = self._start()
                why = await self._until_ready(client, started)
                if why is None:
                    stillborn = 0
                    why = await self._until_bad(client)
                else:
                    stillborn += 1
                withdraw(self.plan.folder, self.id)
                await self._end()
                if self.stop.is_set():
                    return
                if stillborn >= HOPELESS:
                    raise ServerFailed(
                        f"{self.id} {why}, {stillborn} times in a row. The end of {self.log}:\n{self._tail()}"
                    )
                if time.monotonic() - started > BACK_OFF_S[1]:
                    pause = BACK_OFF_S[0]
                self._say(f"{why}; starting again in {pause:g} s")
                await _pause(self.stop, pause)
                await self._until_awake()
                pause = min(2 * pause, BACK_OFF_S[1])
        finally:
            withdraw(self.plan.folder, self.id)
            await self._end()

    async def _until_awake(self) -> None:
        if self.plan.asleep:
            self._say("waits with that: the trainer has the memory")
        while self.plan.asleep and not self.stop.is_set():
            await _pause(self.stop, LOOK_S)

    def _say(self, what: str) -> None:
        print(f"{self.id}: {what}", flush=True)

    def _start(self) -> ServerClient:
        plan = self.plan
        port = _free_port(plan.pool.host)
        command = server_command(
            plan.pool,
            plan.environment,
            model=plan.model,
            port=port,
            key_file=self.key_file,
            context=model_context(plan.model),
            index=self.index,
            colocated=plan.sleeps,
            dtype=plan.dtype,
        )
        plan.folder.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log if self.key is None else subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=self._variables(),
            )
        if self.key is not None:
            copy = partial(_copy_without, self.key.encode(), self.process.stdout, self.log)
            threading.Thread(target=copy, name=f"log of {self.id}", daemon=True).start()
        self.started = datetime.now(UTC).isoformat()
        self._say(f"starting as process {self.process.pid}, log in {self.log}")
        return ServerClient(self.session, f"http://{_reachable(plan.pool.host)}:{port}")

    def _variables(self) -> dict[str, str]:
        plan = self.plan
        own = server_environment(plan.pool, plan.environment, os.environ)
        return own | plugin_environment(plan.folder / "plugin", plan.statistics, own)

    async def _until_ready(self, client: ServerClient, started: float) -> str | None:
        """Wait until the server generates, then announce it. Returns why it never did, or None."""
        limit = self.plan.settings.start_timeout_s
        while not self.stop.is_set():
            if self._exited():
                return f"ended before it was ready ({self._code()})"
            if time.monotonic() - started > limit:
                return f"was not ready within {limit:g} s (servers.start_timeout_s)"
            try:
                await client.call("/health_generate", timeout=self.plan.settings.health_timeout_s, method="GET")
            except Fault:
                await _pause(self.stop, LOOK_S)
                continue
            self._announce(client.url)
            self._say(f"ready at {client.url} after {time.monotonic() - started:.0f} s")
            return None
        return "was told to stop"

    def _announce(self, url: str) -> None:
        assert self.process is not None
        found = self.plan.environment
        announce(
            self.plan.folder,
            Announcement(
                id=self.id,
                url=url,
                pool=self.plan.name,
                pid=self.process.pid,
                started=self.started,
                tp=self.plan.pool.tp,
                torch=found.torch,
                cuda=found.cuda,
                nccl=found.nccl,
            ),
        )

    async def _until_bad(self, client: ServerClient) -> str:
        """Watch a server that is ready. Returns what became of it."""
        settings = self.plan.settings
        # A server that takes an update does not generate: only a longer silence means that it is stuck.
        patience = settings.sync_timeout_s + 2 * settings.health_timeout_s
        well = asked = time.monotonic()
        while not self.stop.is_set():
            if self._exited():
                return f"ended ({self._code()})"
            if self.plan.asleep:
                well = asked = time.monotonic()
            elif time.monotonic() - asked > settings.health_every_s:
                with contextlib.suppress(Fault):
                    await self._check(client)
                    well = time.monotonic()
                asked = time.monotonic()
            if time.monotonic() - well > patience:
                return f"has not been healthy for {patience:g} s"
            await _pause(self.stop, LOOK_S)
        return "was told to stop"

    async def _check(self, client: ServerClient) -> None:
        """Fault for a server that is not well. One that sleeps, maybe since a trainer was killed, cannot generate."""
        limit = self.plan.settings.health_timeout_s
        if not (self.plan.sleeps and await client.label(limit) == ASLEEP):
            await client.check_health(limit)

    def _exited(self) -> bool:
        """Whether the process ended. It is not reaped: until then nobody else can have its process group's number."""
        assert self.process is not None
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None

    def _code(self) -> str:
        assert self.process is not None
        result = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        assert result is not None
        if result.si_code == os.CLD_EXITED:
            return f"exit code {result.si_status}"
        return f"signal {signal.Signals(result.si_status).name}"

    async def _end(self) -> None:
        """End the server and all it started: asked first, then not asked any more."""
        process, self.process = self.process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline and os.waitid(
            os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG
        ) is None:  # fmt: skip
            await asyncio.sleep(LOOK_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _tail(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(f"  {line}" for line in lines[-LOG_LINES:])


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _reachable(host: str) -> str:
    """The name under which others reach a server that listens on `host`."""
    return socket.gethostname() if host == "0.0.0.0" else host
