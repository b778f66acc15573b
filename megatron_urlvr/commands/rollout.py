"""`urlvr rollout status`: what the servers of a run say of themselves."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import aiohttp
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_urlvr.config.addresses import api_key
from megatron_urlvr.config.loader import load_config
from megatron_urlvr.config.servers import ServersSection
from megatron_urlvr.exit_codes import UnusableInput
from megatron_urlvr.rollout.announcements import Announcement, read_announcements
from megatron_urlvr.rollout.client import ServerClient
from megatron_urlvr.rollout.faults import Fault
from megatron_urlvr.run.folder import RunDir

COLUMNS = ("server", "pool", "url", "state", "weights", "started", "torch", "nccl")
PIPE_WIDTH = 400


def print_status(folder: Path) -> None:
    """Print a table of the servers announced in a run's folder. UnusableInput when it is none, or has none."""
    if not folder.is_dir():
        raise UnusableInput(f"there is no folder {folder}: give that of a run.")
    run = RunDir(folder)
    settings = load_config(run.config, []).servers if run.config.exists() else ServersSection()
    found, problems = read_announcements(run.servers, settings.hosts)
    for problem in problems:
        print(problem, file=sys.stderr)
    if not found:
        raise UnusableInput(f"no server is announced in {run.servers}: start some with `urlvr rollout serve CONFIG`.")
    console = Console()
    if not console.is_terminal:
        console = Console(width=PIPE_WIDTH)
    table = Table(*COLUMNS, box=box.SIMPLE_HEAD)
    for row in asyncio.run(_rows(found, settings)):
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)


async def _rows(found: list[Announcement], settings: ServersSection) -> list[tuple[str, ...]]:
    key = api_key(settings.api_key_env)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with aiohttp.ClientSession(headers=headers) as session:
        return list(await asyncio.gather(*(_row(item, session, settings.health_timeout_s) for item in found)))


async def _row(item: Announcement, session: aiohttp.ClientSession, timeout: float) -> tuple[str, ...]:
    client = ServerClient(session, item.url)
    weights, state = "", "healthy"
    try:
        weights = await client.label(timeout)
        await client.check_health(timeout)
    except Fault as fault:
        state = str(fault)
    return item.id, item.pool, item.url, state, weights, item.started, item.torch, item.nccl
