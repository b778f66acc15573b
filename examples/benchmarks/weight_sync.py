"""Four ways to hand 1 GB of weights to a server in another process on this machine, over loopback, in one run.

    bare     one broadcast of one flat tensor over gloo: what the wire takes, nothing else
    group    `servers.transport: group`: buckets, each announced by an HTTP call
    tensors  the same transport with one tensor a bucket: a call and a broadcast each
    disk     `servers.transport: disk`: a safetensors snapshot is written, and the server reads it

They take turns, in another order each round. The server is a small one of this file, in a process of its own, that
joins the group as SGLang does and lets go of what it received; SGLang would first copy it into its model, equal work
for all. What arrives is compared in a round that is not counted.
`bare` begins with the tensor flat; the others begin with a stream of tensors, as the policy exports it, and end when
the server has said that it is done.

    python examples/benchmarks/weight_sync.py --rounds 5
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from aiohttp import web
from safetensors.torch import load_file

from megatron_urlvr.rollout.client import ServerClient
from megatron_urlvr.rollout.loop import HttpLoop
from megatron_urlvr.rollout.pool import Server
from megatron_urlvr.rollout.weight_sync.buckets import buckets
from megatron_urlvr.rollout.weight_sync.group import GroupTransport
from megatron_urlvr.rollout.weight_sync.snapshot import Snapshots

LIMIT_S = 120
LAYER = {"qkv": (1536, 1024), "o": (1024, 1024), "up": (5632, 1024), "down": (1024, 2816), "norm": (1024,)}
"""Shapes of one layer, of a model of about half a billion parameters."""


# -- the server --------------------------------------------------------------------------------------------------------


def serve(pipe: Connection) -> None:
    """Serve on a free port, told through `pipe`, until the process is ended."""
    torch.set_num_threads(1)
    receiver = Receiver()
    application = web.Application(client_max_size=1 << 24)
    application.add_routes([web.post("/{call}", receiver.answer)])

    async def run() -> None:
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        pipe.send(runner.addresses[0][1])
        await asyncio.Event().wait()

    asyncio.run(run())


class Receiver:
    """The calls of SGLang's API that carry weights."""

    def __init__(self) -> None:
        self.groups: dict[str, Any] = {}
        self.held: dict[str, torch.Tensor] = {}
        self.keeps = False
        self.flat: torch.Tensor | None = None

    async def answer(self, request: web.Request) -> web.Response:
        """One call. Work that blocks runs beside the event loop."""
        call = getattr(self, request.match_info["call"])
        await asyncio.get_running_loop().run_in_executor(None, call, await request.json())
        return web.json_response({"success": True, "message": "ok"})

    def init_weights_update_group(self, body: dict[str, Any]) -> None:
        timeout = datetime.timedelta(seconds=LIMIT_S)
        store = dist.TCPStore(body["master_address"], body["master_port"], is_master=False, timeout=timeout)
        for prefix in (body["group_name"], f"{body['group_name']}/", "cpu/"):
            store = dist.PrefixStore(prefix, store)
        self.groups[body["group_name"]] = dist.ProcessGroupGloo(store, body["rank_offset"], body["world_size"], timeout)

    def destroy_weights_update_group(self, body: dict[str, Any]) -> None:
        self.groups.pop(body["group_name"])

    def begin_weight_update(self, body: dict[str, Any]) -> None:
        self.held = {}

    def end_weight_update(self, body: dict[str, Any]) -> None:
        pass

    def update_weights_from_distributed(self, body: dict[str, Any]) -> None:
        kinds = [getattr(torch, name) for name in body["dtypes"]]
        found = [torch.empty(shape, dtype=kind) for shape, kind in zip(body["shapes"], kinds, strict=True)]
        self.receive(self.groups[body["group_name"]], *found)
        if self.keeps:
            self.held |= zip(body["names"], found, strict=True)

    def bare(self, body: dict[str, Any]) -> None:
        if self.flat is None:
            self.flat = torch.zeros(body["bytes"], dtype=torch.uint8)
        self.receive(self.groups[body["group_name"]], self.flat)

    def update_weights_from_disk(self, body: dict[str, Any]) -> None:
        self.held = {}
        for file in sorted(Path(body["model_path"]).glob("*.safetensors")):
            for name, tensor in load_file(file).items():  # mapped: cloned, so that it is read
                copy = tensor.clone()
                if self.keeps:
                    self.held[name] = copy

    def keep(self, body: dict[str, Any]) -> None:
        self.keeps = body["keep"]
        self.held = {}

    @staticmethod
    def receive(group: Any, *tensors: torch.Tensor) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        for work in [group.broadcast([each], options) for each in tensors]:
            work.wait()

    def check(self, body: dict[str, Any]) -> None:
        """ValueError (and so status 500) when what is held is not what was sent."""
        found = {name: float(tensor.double().sum()) for name, tensor in self.held.items()}
        if found != body["sums"]:
            raise ValueError("the weights that arrived are not those that were sent")


# -- the contenders ----------------------------------------------------------------------------------------------------


class Sender:
    """The trainer's side."""

    def __init__(self, url: str, tensors: dict[str, torch.Tensor], bucket_mb: int, folder: Path) -> None:
        self.tensors, self.bucket, self.folder = tensors, bucket_mb << 20, folder
        self.loop = HttpLoop()
        self.server = self.loop.run(self._server(url))
        self.flat = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in tensors.values()])
        self.transport = GroupTransport(self.loop, device=torch.device("cpu"), session="benchmark", timeout_s=LIMIT_S)
        (folder / "model").mkdir()
        self.snapshots = Snapshots(folder / "snapshots", folder / "model")
        self.version = 0

    async def _server(self, url: str) -> Server:
        return Server("benchmark", ServerClient(self.loop.session, url), state="up")

    def call(self, path: str, body: dict[str, Any]) -> Any:
        """A call, answered later."""
        return self.loop.submit(self.server.client.command(path, body, timeout=LIMIT_S))

    def stream(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors by name."""
        yield from self.tensors.items()

    def bare(self) -> None:
        """One broadcast of all bytes."""
        from megatron_urlvr.rollout.weight_sync.process_group import broadcast

        answer = self.call("/bare", {"group_name": self.transport.name, "bytes": self.flat.numel()})
        broadcast(self.transport.group, self.flat).wait()
        answer.result(LIMIT_S)

    def group(self) -> None:
        """`servers.transport: group`."""
        self._send(self.bucket)

    def tensor_by_tensor(self) -> None:
        """A bucket for each tensor."""
        self._send(1)

    def _send(self, limit: int) -> None:
        self.transport.open([self.server], restarted=False)
        for bucket in buckets(self.stream(), limit, packed=self.transport.packs):
            self.transport.send(bucket, None)
        if not self.transport.finish():
            raise RuntimeError(f"the update failed: {self.transport.failure}")

    def disk(self) -> None:
        """`servers.transport: disk`."""
        self.version += 1
        self.snapshots.begin(f"version-{self.version}")
        for bucket in buckets(self.stream(), self.bucket):
            self.snapshots.add(bucket)
        folder = self.snapshots.commit().result()
        self.call("/update_weights_from_disk", {"model_path": str(folder)}).result(LIMIT_S)

    def close(self) -> None:
        """Leave the group and remove the snapshots."""
        self.transport.close()
        self.snapshots.close()
        self.loop.close()


def weights(size: float) -> dict[str, torch.Tensor]:
    """About `size` GB of float32 tensors with the shapes of a model's."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    total = layer = 0
    while total < size * 1e9:
        for name, shape in LAYER.items():
            tensor = torch.randn(shape, generator=generator)
            tensors[f"layers.{layer}.{name}"] = tensor
            total += tensor.nbytes
        layer += 1
    return tensors


def measure(sender: Sender, rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender, round by round, after one that is not counted."""
    contenders: dict[str, Callable[[], None]] = {
        "bare": sender.bare,
        "group": sender.group,
        "tensors": sender.tensor_by_tensor,
        "disk": sender.disk,
    }
    sums = {name: float(tensor.double().sum()) for name, tensor in sender.tensors.items()}
    sender.group()  # forms the group
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    order = random.Random(0)
    for turn in range(rounds + 1):
        sender.call("/keep", {"keep": turn == 0}).result(LIMIT_S)
        for name in order.sample(sorted(contenders), len(contenders)):
            started = time.perf_counter()
            contenders[name]()
            taken = time.perf_counter() - started
            if turn:
                seconds[name].append(taken)
            elif name != "bare":
                sender.call("/check", {"sums": sums}).result(LIMIT_S)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.0, help="size of the weights")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bucket-mb", type=int, default=512, help="servers.bucket_mb")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    server = context.Process(target=serve, args=(there,), daemon=True)
    server.start()
    tensors = weights(options.gb)
    size = sum(tensor.nbytes for tensor in tensors.values()) / 1e9
    try:
        with tempfile.TemporaryDirectory() as folder:
            sender = Sender(f"http://127.0.0.1:{here.recv()}", tensors, options.bucket_mb, Path(folder))
            seconds = measure(sender, options.rounds)
            sender.close()
    finally:
        server.kill()
        server.join()
    print(f"{size:.2f} GB in {len(tensors)} tensors, {options.rounds} rounds, buckets of {options.bucket_mb} MB")
    print(f"{'':>8}  {'median s':>8}  {'min':>6}  {'max':>6}  {'GB/s':>6}  {'of bare':>7}")
    bare = statistics.median(seconds["bare"])
    for name, each in seconds.items():
        middle = statistics.median(each)
        print(
            f"{name:>8}  {middle:8.3f}  {min(each):6.3f}  {max(each):6.3f}  {size / middle:6.2f}  {middle / bare:6.2f}x"
        )
    if options.json:
        options.json.write_text(json.dumps({"gb": size, "tensors": len(tensors), "seconds": seconds}))


if __name__ == "__main__":
    main()
