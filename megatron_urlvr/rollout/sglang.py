"""The SGLang engine: rollouts from servers elsewhere, reached over HTTP; weights pushed by the first replica.

main thread      generate, start ─┐         ┌─► groups           begin_update ─► update ─► end_update ─► resume
loop's thread                     └► dispatch (requests, retries, faults)  ◄─ pauses, and goes on with new weights
finisher's thread                       └► decode ─► keep (the ledger) ─┘
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import torch

from ..config.addresses import api_key, key_problem
from ..config.servers import POLICY, ServersSection
from ..exit_codes import UnusableInput
from ..types import Group, Prompt, Sample, Sampling
from .answers import Answer
from .dispatch import Dispatch, Model
from .early import EarlyVotes
from .engine import RolloutEngine
from .faults import FaultCounts
from .flight import Flight
from .loop import HttpLoop
from .plugin import require_statistics
from .pool import ServerHealth, ServerPool
from .versions import Versions
from .weight_sync.group import GroupTransport
from .weight_sync.snapshot import Snapshots
from .weight_sync.sync import WeightSync
from .weight_sync.transport import DiskTransport, Transport


class SGLangEngine(RolloutEngine):
    """Asks the servers of the policy's pool. Sampling is the servers' own: seeds do not reach it."""

    overlaps = True

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
        self.shares_memory = servers.colocated
        for url in servers.policy.urls:
            if problem := key_problem(urlsplit(url).hostname or "", servers.api_key_env):
                raise UnusableInput(f"servers.pools.{POLICY}.urls: {problem}.")
        self.decode, self.served = decode, served
        self.versions = Versions(session)
        self.limit = max(1, servers.policy.concurrency // replicas)
        self.loop = HttpLoop(api_key(servers.api_key_env))
        self.pool = ServerPool(servers.policy, servers, folder, name=POLICY)
        self.faults = FaultCounts()
        self.finisher = ThreadPoolExecutor(1, thread_name_prefix="groups")
        self._asked_for_statistics = not served.statistics
        self.votes: EarlyVotes | None = None
        """Counts votes as they come, where sampling may end early."""
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
                folder=folder,
                interrupted=lambda: self.interrupted(),
            )

    # -- weights ------------------------------------------------------------------------------------------------------

    def sleep(self) -> None:
        """See RolloutEngine. RolloutFailed when a server keeps its memory."""
        if self.sync is not None:
            self.sync.sleep()

    def begin_update(self, version: int) -> None:
        """See RolloutEngine. Waits for a server when there is none."""
        self.versions.coming = version
        if self.sync is not None:
            self.sync.begin(self.versions.of(version))
        else:
            self.loop.run(_now(self.pool.begin_update))

    def update(self, bucket: Iterable[tuple[str, torch.Tensor]]) -> None:
        """See RolloutEngine."""
        if self.sync is not None:
            self.sync.send(bucket)
            return
        for _ in bucket:
            pass

    def end_update(self) -> None:
        """See RolloutEngine."""
        assert self.versions.coming is not None, "end_update without begin_update"
        if self.sync is not None:
            self.sync.end()
            if not self._asked_for_statistics:
                self._asked_for_statistics = True
                up = [server.client for server in self.pool.up()]
                self.loop.run(require_statistics(up, self.served.statistics, self.settings.timeout_s))
        self.version = self.versions.served = self.versions.coming
        self.versions.coming = None

    def resume(self) -> None:
        """See RolloutEngine. A replica that pushes nothing asks every server which weights it holds by now."""
        self.loop.run(self._resume())

    async def _resume(self) -> None:
        if self.sync is None:
            self.pool.discover(self.loop.session)
            await self.pool.verify(self.versions.label)
        self.pool.end_update()

    # -- generation ---------------------------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Flight:
        """Groups as they finish. RolloutFailed when no server is left; Abandoned when asked to stop."""
        return self._launch(prompts, sampling, None, ahead=False)

    def start(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, keep: Callable[[Group], None] | None = None
    ) -> Flight:
        """See RolloutEngine."""
        return self._launch(prompts, sampling, keep, ahead=True)

    def _launch(
        self, prompts: Sequence[Prompt], sampling: Sampling, keep: Callable[[Group], None] | None, *, ahead: bool
    ) -> Flight:
        assert self.versions.coming is None, "generate between begin_update and end_update"
        flight = Flight(len(prompts), lambda: self.interrupted())

        def finish(prompt: Prompt, answers: Sequence[Answer]) -> None:
            group = self._group(prompt, answers)
            if keep is not None:
                keep(group)
            flight.land(group)

        def emit(place: int, answers: list[Answer]) -> None:
            self.finisher.submit(flight.guarded, finish, prompts[place], answers)

        flight.fly(self.loop.submit(self._dispatch(prompts, sampling, emit, ahead)), self.finisher)
        return flight

    async def _dispatch(
        self, prompts: Sequence[Prompt], sampling: Sampling, emit: Callable[[int, list[Answer]], None], ahead: bool
    ) -> None:
        await Dispatch(
            self.pool,
            self.loop.session,
            self.settings,
            model=self.served,
            versions=self.versions,
            limit=self.limit,
            faults=self.faults,
            repair=self.sync.repair if self.sync is not None else None,
            emit=emit,
            votes=self.votes,
        ).run(prompts, sampling, ahead=ahead)

    def _group(self, prompt: Prompt, answers: Sequence[Answer]) -> Group:
        samples = [
            Sample(
                prompt_id=prompt.id,
                index=index,
                tokens=answer.tokens,
                text=self.decode(answer.tokens[:-1] if answer.finish == "stop" else answer.tokens),
                finish=answer.finish,
                logp=answer.logp,
                version=answer.spans[-1].version,
                spans=answer.spans if len(answer.spans) > 1 else (),
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
        if self.votes is not None:
            taken |= self.votes.take()
        if self.sync is not None:
            taken |= self.sync.metrics
            self.sync.metrics = {}
        return taken

    def close(self) -> None:
        """Leave the servers and end the thread."""
        if self.sync is not None:
            self.sync.close()
        self.loop.close()
        self.finisher.shutdown()


async def _now(call: Callable[[], None]) -> None:
    """`call` on the loop's thread."""
    call()


def _snapshot_folder(servers: ServersSection, folder: Path, session: str) -> Path:
    """A folder of this trainer alone: what else lies in `servers.snapshot_dir` is somebody else's."""
    if servers.snapshot_dir is not None:
        return Path(servers.snapshot_dir) / f"urlvr-{session}"
    own = folder / "weights"
    shutil.rmtree(own, ignore_errors=True)  # what a killed trainer of this run left
    return own / session
