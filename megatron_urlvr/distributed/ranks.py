"""Which rank this process is, as torchrun or srun says it, and how ranks that srun started find each other.

torchrun's variables (RANK, WORLD_SIZE, ...) are what everything else reads. srun sets none of them, nor is there an
agreed port: its ranks translate Slurm's variables, and the first one leaves its address in the run's folder.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import socket
import time
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch.distributed as dist

LOOK_S = 0.1
MEETING_TIMEOUT = datetime.timedelta(minutes=10)
"""Longest from the first rank's arrival to the last one's: imports from a cold network file system take minutes."""
KEY = ("JOB_ID", "RESTART_COUNT", "STEP_ID")
"""Slurm's variables that tell one start of the ranks from every other one."""


class RankMissing(RuntimeError):  # noqa: N818 - says what happened
    """Not all ranks came. The message is a sentence."""


def adopt_srun(environment: MutableMapping[str, str]) -> None:
    """Set torchrun's variables from those of an srun step.

    Nothing changes where torchrun set them, and outside of steps: in a batch script SLURM_PROCID is 0 as well, but it
    has no SLURM_STEP_ID.
    """
    if "RANK" in environment or not {"SLURM_STEP_ID", "SLURM_PROCID"} <= environment.keys():
        return
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    counts = _tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
    environment["LOCAL_WORLD_SIZE"] = str(counts[int(environment["SLURM_NODEID"])])


def _tasks_per_node(text: str) -> list[int]:
    """Slurm's short form, node by node: `2(x3),1` is [2, 2, 2, 1]."""
    parts = (re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in text.split(","))
    return [int(part[1]) for part in parts if part for _ in range(int(part[2] or 1))]


def must_meet(environment: Mapping[str, str]) -> bool:
    """Whether these ranks have no address to meet at: torchrun gives one, srun does not."""
    return int(environment.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" not in environment


def meet(
    folder: Path, environment: Mapping[str, str] = os.environ, *, timeout: datetime.timedelta = MEETING_TIMEOUT
) -> dist.Store:
    """The store that all ranks of this srun step share, for `init_process_group`.

    The first rank opens a free port and writes `<folder>/<job>.<restart>.<step>.json`, which goes when all are there:
    what a killed job left behind has another name. RankMissing after `timeout`.
    """
    rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    path = folder / f"{'.'.join(environment.get(f'SLURM_{name}', '0') for name in KEY)}.json"
    if rank == 0:
        host = environment.get("SLURMD_NODENAME") or socket.gethostname()
        store = _open_store(path, host, world, timeout)
    else:
        store = _find_store(path, world, timeout)
    try:
        if store.add("arrived", 1) == world:
            store.set("complete", "yes")
        store.wait(["complete"], timeout)
    except RuntimeError as error:  # torch's DistError is one
        limit = timeout.total_seconds()
        raise RankMissing(f"not all {world} ranks of {path.stem} came together within {limit:g} s: {error}") from error
    finally:
        if rank == 0:
            path.unlink(missing_ok=True)
    return store


def _open_store(path: Path, host: str, world: int, timeout: datetime.timedelta) -> dist.Store:
    import torch.distributed as dist

    from ..run.folder import write_json

    store = dist.TCPStore(host, 0, world, is_master=True, timeout=timeout, wait_for_workers=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"host": host, "port": store.port})
    return store


def _find_store(path: Path, world: int, timeout: datetime.timedelta) -> dist.Store:
    import torch.distributed as dist

    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        try:
            address = json.loads(path.read_text(encoding="utf-8"))
            break
        except FileNotFoundError:
            if time.monotonic() > deadline:
                raise RankMissing(
                    f"rank 0 has not left its address in {path} within {timeout.total_seconds():g} s: see its own"
                    " messages, and whether all nodes share this folder"
                ) from None
            time.sleep(LOOK_S)
    return dist.TCPStore(address["host"], address["port"], world, timeout=timeout, wait_for_workers=False)
