"""A process group of the trainer's first rank and the servers' ranks, outside the trainer's own world."""

from __future__ import annotations

import datetime
import inspect
import socket
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import (
    Backend,
    PrefixStore,
    _abort_process_group,
    _new_process_group_helper,
    _world,
)

from ...config.addresses import is_loopback
from ...environment import variables

LOSING_A_SERVER = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "2", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}
"""What a group over NCCL does when a server is lost in a broadcast, or does not join it in time: it gives up its
communicator. By default it ends the process, which is the trainer's (torch 2.9 to 2.13, ProcessGroupNCCL.cpp: a group
reads this when it is made)."""


class Rendezvous:
    """The address servers join at, opened before they are told of it: no port is guessed, and on one machine the
    store listens on loopback alone."""

    def __init__(self, peers: list[str], timeout_s: float) -> None:
        """`peers`: hosts of the servers."""
        self.host = "127.0.0.1" if all(is_loopback(peer) for peer in peers) else _address_towards(peers)
        self.timeout = datetime.timedelta(seconds=timeout_s)
        listener = socket.socket()
        listener.bind((self.host, 0))
        listener.listen(128)
        self.port = int(listener.getsockname()[1])
        self.store = dist.TCPStore(
            self.host,
            self.port,
            is_master=True,
            wait_for_workers=False,
            timeout=self.timeout,
            master_listen_fd=listener.detach(),
        )

    def group(self, name: Any, world_size: int, backend: str) -> Any:
        """Rank 0 of the group `name`. Blocks until the servers have joined; RuntimeError when they do not in time."""
        parameters = inspect.signature(_new_process_group_helper).parameters
        options = {key: None for key in ("backend_options", "pg_options") if key in parameters}
        with variables(LOSING_A_SERVER):
            group, _ = _new_process_group_helper(
                world_size,
                0,
                [],
                Backend(backend),
                PrefixStore(name, self.store),
                group_name=name,
                timeout=self.timeout,
                **options,
            )
        _world.pg_group_ranks[group] = {rank: rank for rank in range(world_size)}  # for destroy_process_group
        return group


def abort(group: Any) -> None:
    """Leave a group over NCCL in the middle of a broadcast, which ends on the device with that."""
    _abort_process_group(group)


def broadcast(group: Any, tensor: Any) -> Any:
    """Send from rank 0 of `group`; returns the work in progress."""
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    return group.broadcast([tensor], options)


def _address_towards(peers: list[str]) -> str:
    """This machine's address on the way to the first peer that is elsewhere. Nothing is sent."""
    far = next(peer for peer in peers if not is_loopback(peer))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((far, 9))
        return str(probe.getsockname()[0])
