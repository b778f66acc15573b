"""The SGLang engine: rollouts from servers elsewhere, reached over HTTP; weights pushed by the first replica."""

from __future__ import annotations

import queue
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from urllib.parse import urlsplit

import torch

from ..config.addresses import api_key, key_problem
from ..config.servers import POLICY, ServersSection
from ..exit_codes import UnusableInput
from ..types import Group, Prompt, Sample, Sampling
from .answers import Answer
from .dispatch import Dispatch, Model
from .engine import RolloutEngine
from .faults import Abandoned, FaultCounts
from .loop import POLL_S, HttpLoop
from .plugin import require_statistics
from .pool import ServerHealth, ServerPool
from .weight_sync.group import GroupTransport
from .weight_sync.snapshot import Snapshots
from .weight_sync.sync import WeightSync
from .weight_sync.transport import DiskTransport, Transport


class SGLangEngine(RolloutEngine):
    """Asks the servers of the policy's pool. Sampling is the servers' own: seeds do not reach it."""

    def __init__(
        self,
        servers: ServersSection,
        *,
        folder: Path,
        model: Path,
        decode: Callable[[Sequence[int]], str],
        served: Model,
        device: torch.device,
        session: str,
        replicas: int = 1,
        pushes: bool = True,
    ) -> None:
        """`folder`: where servers announce themselves. `session`: names this run's process in labels of weights, the
        same on every replica. `pushes`: whether this replica is the one that sends weights; the others wait until
        servers hold them. UnusableInput for servers that would take weights from anyone."""
        self.settings = servers
        for url in servers.policy.urls:
            if problem := key_problem(urlsplit(url).hostname or "", servers.api_key_env):
                raise UnusableInput(f"servers.pools.{POLICY}.urls: {problem}.")
        self.decode, self.served, self.session = decode, served, session
        self.limit = max(1, servers.policy.concurrency // replicas)
        self.loop = HttpLoop(api_key(servers.api_key_env))
        self.pool = ServerPool(servers.policy, servers, folder, name=POLICY)
        self.faults = FaultCounts()
        self._asked_for_statistics = not served.statistics
        self.version = 0
        self._pending: int | None = None
        self.sync: WeightSync | None = None
        if pushes:
            snapshots = Snapshots(_snapshot_folder(servers, folder, session), model)
            transport: Transport = DiskTransport()
            if servers.transport == "group":
                transport = GroupTransport(self.loop, device=device, session=session, timeout_s=servers.sync_timeout_s)
            self.sync = WeightSync(
                self.pool,
                self.loop,
                servers,
                transport=transport,
                snapshots=snapshots,
                interrupted=lambda: self.interrupted(),
            )

    def label(self, version: int) -> str:
        """How the weights of `version` are called on servers."""
        return f"{self.session}-{version}"

    # -- weights ------------------------------------------------------------------------------------------------------

    def begin_update(self, version: int) -> None:
        """See RolloutEngine. Waits for a server when there is none."""
        self._pending = version
        if self.sync is not None:
            self.sync.begin(self.label(version))

    def update(self, bucket: Iterable[tuple[str, torch.Tensor]]) -> None:
        """See RolloutEngine."""
        if self.sync is not None:
            self.sync.send(bucket)
            return
        for _ in bucket:
            pass

    def end_update(self) -> None:
        """See RolloutEngine."""
        assert self._pending is not None, "end_update without begin_update"
        if self.sync is not None:
            self.sync.end()
            if not self._asked_for_statistics:
                self._asked_for_statistics = True
                up = [server.client for server in self.pool.up()]
                self.loop.run(require_statistics(up, self.served.statistics, self.settings.timeout_s))
        else:
            # What this replica knew is out of date: every server is asked again for the weights it holds.
            self.loop.run(self._forget())
        self.version, self._pending = self._pending, None

    async def _forget(self) -> None:
        self.pool.servers.clear()

    # -- generation ---------------------------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Group]:
        """Groups as they finish. RolloutFailed when no server is left; Abandoned when asked to stop."""
        assert self._pending is None, "generate between begin_update and end_update"
        finished: queue.SimpleQueue[tuple[int, list[Answer]]] = queue.SimpleQueue()
        work = self.loop.submit(self._dispatch(prompts, sampling, lambda p, answers: finished.put((p, answers))))
        try:
            for _ in prompts:
                place, answers = self._next(finished, work)
                yield self._group(prompts[place], answers)
        finally:
            work.cancel()

    async def _dispatch(
        self, prompts: Sequence[Prompt], sampling: Sampling, emit: Callable[[int, list[Answer]], None]
    ) -> None:
        await Dispatch(
            self.pool,
            self.loop.session,
            self.settings,
            model=self.served,
            label=self.label(self.version),
            limit=self.limit,
            faults=self.faults,
            repair=self.sync.repair if self.sync is not None else None,
            emit=emit,
        ).run(prompts, sampling)

    def _next(
        self, finished: queue.SimpleQueue[tuple[int, list[Answer]]], work: Future[None]
    ) -> tuple[int, list[Answer]]:
        while True:
            try:
                return finished.get(timeout=POLL_S)
            except queue.Empty:
                if work.done() and finished.empty():
                    work.result()
                    raise RuntimeError("generation ended before its last group") from None
                if self.interrupted():
                    raise Abandoned from None

    def _group(self, prompt: Prompt, answers: Sequence[Answer]) -> Group:
        samples = [
            Sample(
                prompt_id=prompt.id,
                index=index,
                tokens=answer.tokens,
                text=self.decode(answer.tokens[:-1] if answer.finish == "stop" else answer.tokens),
                finish=answer.finish,
                logp=answer.logp,
                version=self.version,
                stats=answer.stats,
            )
            for index, answer in enumerate(answers)
        ]
        return Group(prompt, samples)

    # -- state --------------------------------------------------------------------------------------------------------

    def health(self) -> list[ServerHealth]:
        """Every known server and whether it may be asked."""
        return self.loop.run(self._describe())

    async def _describe(self) -> list[ServerHealth]:
        self.pool.discover(self.loop.session)
        return self.pool.describe()

    def metrics(self) -> dict[str, float]:
        """Faults by kind and the phases of the last update, since the last call."""
        taken = self.faults.take() | {"rollout/servers": float(sum(s.up for s in self.health()))}
        if self.sync is not None:
            taken |= self.sync.metrics
            self.sync.metrics = {}
        return taken

    def close(self) -> None:
        """Leave the servers and end the thread."""
        if self.sync is not None:
            self.sync.close()
        self.loop.close()


def _snapshot_folder(servers: ServersSection, folder: Path, session: str) -> Path:
    """A folder of this session alone: what else lies in `servers.snapshot_dir` is somebody else's."""
    if servers.snapshot_dir is not None:
        return Path(servers.snapshot_dir) / f"urlvr-{session}"
    own = folder / "weights"
    shutil.rmtree(own, ignore_errors=True)  # what a killed trainer of this run left
    return own / session
