"""Servers on the trainer's own GPUs: they give their memory back while the policy trains (`servers.colocated`).

    generate ─► idle ─► asleep: cache and weights released ─► score, update, write the snapshot
    generate ◄─ continue ◄─ flush ◄─ cache ◄─ read the snapshot ◄─ weights ◄─┘

What SGLang 0.5.23 does (managers/scheduler_components/weight_updater.py) decides how it is asked. A release while a
request is anywhere on the server, or a resume of what was not released, is an assertion that ends the server; released
weights come back with whatever lay in that memory; and a health check generates a token, on weights that are not there.
So a server is paused and emptied first, and its state stands where every other truth about its weights stands: in its
label, which `asleep` and `waking` take the place of. A server that was left half awake is not touched again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from ..config.addresses import api_key
from ..config.servers import POLICY, ServersSection
from ..exit_codes import UnusableInput
from .client import ServerClient
from .faults import Abandoned, Fault
from .loop import HttpLoop
from .patience import Patience
from .pool import ServerPool

ASLEEP = "asleep"
WAKING = "waking"
"""Labels of servers without the memory of weights and cache, and with some of it."""
TAGS = ("kv_cache", "weights")
LOOK_S = 0.2


def marker(folder: Path) -> Path:
    """A file beside the announcements while servers sleep: their supervisors leave them alone then, and start none."""
    return folder / "ASLEEP"


async def require_saver(client: ServerClient, timeout: float) -> None:
    """UnusableInput for a server on a GPU that cannot give memory back. On a CPU there is none to give."""
    info = await client.call("/server_info", timeout=timeout, method="GET")
    if not isinstance(info, Mapping):
        raise Fault("schema", f"{client.url}/server_info is no object")
    if info.get("device") != "cpu" and info.get("enable_memory_saver") is not True:
        raise UnusableInput(
            f"servers.colocated = true, but the server at {client.url} was started without --enable-memory-saver and"
            " keeps its memory: start servers with `urlvr rollout serve` and this setting, or set it to false."
        )


async def put_to_sleep(client: ServerClient, limit: float) -> None:
    """Empty a server of requests and release its memory; nothing where it sleeps already. Fault when it does not."""
    label = await client.label(limit)
    if label == ASLEEP:
        return
    if label == WAKING:
        raise Fault("version", f"{client.url} was left half awake; start it again")
    await client.command("/pause_generation", {"mode": "retract"}, timeout=limit)
    await client.command("/abort_request", {"rid": "", "abort_all": True}, timeout=limit)
    await client.flush_cache(limit)  # refused for as long as it is not idle
    await client.relabel(ASLEEP, limit)
    await client.command("/release_memory_occupation", {"tags": list(TAGS)}, timeout=limit)


async def wake(client: ServerClient, read: Callable[[], Awaitable[None]], label: str, limit: float) -> None:
    """Give a sleeping server its memory back, and weights by `read`, which leaves the label `waking`; it generates when
    this returns. Fault where it cannot; then it is half awake."""
    await client.relabel(WAKING, limit)
    await client.command("/resume_memory_occupation", {"tags": ["weights"]}, timeout=limit)
    await read()
    await client.command("/resume_memory_occupation", {"tags": ["kv_cache"]}, timeout=limit)
    await client.flush_cache(limit)
    await client.relabel(label, limit)
    await client.command("/continue_generation", timeout=limit)


def settle(servers: ServersSection, folder: Path, *, hosts: int, interrupted: Callable[[], bool]) -> None:
    """Before the policy is built: wait for all servers of this run, and let them sleep, so that it finds memory.

    `hosts`: of the trainer, each with its own servers. UnusableInput for servers that cannot sleep, RolloutFailed when
    some are missing after `wait_s`, Abandoned when asked to stop.
    """
    marker(folder).unlink(missing_ok=True)  # of a trainer that was killed: servers that died since may start now
    wanted = len(servers.policy.urls) or servers.policy.count * hosts
    loop = HttpLoop(api_key(servers.api_key_env))
    pool = ServerPool(servers.policy, servers, folder, name=POLICY)
    try:
        loop.run(_settle(servers, pool, loop, wanted, interrupted))
    finally:
        loop.close()
    folder.mkdir(parents=True, exist_ok=True)
    marker(folder).touch()


async def _settle(
    servers: ServersSection, pool: ServerPool, loop: HttpLoop, wanted: int, interrupted: Callable[[], bool]
) -> None:
    patience, asleep, why = Patience(servers.wait_s, "complete set of colocated servers"), set[tuple[str, str]](), ""
    while True:
        pool.discover(loop.session)
        for server in pool.servers.values():
            if server.incarnation in asleep:
                continue
            try:
                await require_saver(server.client, servers.health_timeout_s)
                await put_to_sleep(server.client, servers.sync_timeout_s)
                asleep.add(server.incarnation)
            except Fault as fault:
                why = f"; last: {fault}"
        there = sum(server.incarnation in asleep for server in pool.servers.values())
        if there >= wanted:
            return
        if interrupted():  # between servers: one must know what it has given back
            raise Abandoned
        patience.missing(
            asyncio.get_running_loop().time(),
            f"of {wanted} servers {there} are there and asleep, and before all are the policy cannot be built; run"
            f" `urlvr rollout serve` on every host of the trainer{why}",
        )
        await asyncio.sleep(LOOK_S)
