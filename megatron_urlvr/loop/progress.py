"""How far a run has come: the step that counts, what a checkpoint keeps of it, and how it is gone back to."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..config.root import Config
from ..data.labels import uses_of
from ..distributed.exchange import any_rank
from ..run.files import RunFiles
from ..run.interrupts import Interrupts, Preempted
from .assembly import Parts
from .collapse_watch import Collapsed, CollapseWatch
from .feed import Feed


class Progress:
    """The state of one run on one rank, between its steps."""

    def __init__(self, config: Config, parts: Parts, files: RunFiles, interrupts: Interrupts) -> None:
        self.config, self.parts, self.files, self.interrupts = config, parts, files, interrupts
        self.step = self.version = self.tokens = 0
        self.seconds: dict[str, float] = {}
        self.feed = Feed(config, parts, files.ledger)
        stale, snapshots = config.rollout.max_staleness, files.folder.snapshots
        self.watch = CollapseWatch(config.monitor.collapse, parts.layout, snapshots, staleness=stale)
        if parts.engine is not None:
            parts.engine.interrupted = lambda: interrupts.received is not None
        self.completed: dict[str, Any] | None = None
        """What a checkpoint of the last completed step keeps; None before step 0 is evaluated and logged."""
        self.untouched = True
        """The weights are those of the last completed step."""

    def complete(self, metrics: Mapping[str, float]) -> None:
        """Log the step that was taken. From now on it is the one that a signal leaves saved.

        Sampling needs no state: its seeds come from the run's seed, the step and the sample.
        """
        self.files.log(self.step, metrics)
        self.completed = {"step": self.step, "version": self.version, "tokens": self.tokens}
        self.completed |= {"stream": self.feed.state_dict(), "labels": dict(self.parts.labels.uses)}
        self.completed |= {"watch": self.watch.state_dict(), "providers": self.parts.signals.state_dict()}
        self.untouched = True

    def save(self, *, wait: bool = True) -> None:
        """A checkpoint after the last completed step. Called only where the weights are those of that step. Without
        `wait` it is written while the next steps are taken."""
        assert self.completed is not None, "there is nothing to save before step 0 is complete"
        self.files.save(self.parts.policy, self.completed, wait=wait)

    def save_if_due(self) -> None:
        """A checkpoint every so many steps."""
        settings = self.config.checkpoint
        if settings.every and self.step % settings.every == 0:
            self.save(wait=not settings.background)

    def keep_snapshot(self) -> None:
        """Weights to roll back to, where `monitor.collapse` asks for them."""
        assert self.completed is not None
        self.watch.keep(self.parts.policy, self.completed)

    def roll_back(self, alarm: Collapsed) -> bool:
        """Go back to the last healthy snapshot; False when none is left. Checkpoints after it are set aside."""
        state = self.watch.roll_back(self.parts.policy, alarm)
        if state is not None:
            self.restore(state)
            self.files.set_aside_after(self.step)
            self.feed.forget_after(self.step)
        return state is not None

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Continue after a checkpoint's step."""
        if state is None:
            return
        self.step, self.version, self.tokens = state["step"], state["version"], state["tokens"]
        self.feed.load_state_dict(state["stream"])
        uses = uses_of(state["labels"], self.parts.layout.dp_rank, self.parts.layout.dp)
        self.parts.labels.uses.update(uses)
        if "watch" in state:  # not in checkpoints from before there was one
            self.watch.load_state_dict(state["watch"])
        self.parts.signals.load_state_dict(state.get("providers", {}))
        self.completed = {**state, "labels": uses}

    def heed_signals(self) -> None:
        """Raise Preempted, on every rank, when any rank has received a signal. Called only where the weights are those
        of the last completed step."""
        if any_rank(self.interrupts.received is not None, self.parts.layout):
            raise Preempted

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase."""
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started

    def timings(self, metrics: Mapping[str, float], seconds: float) -> dict[str, float]:
        """Seconds of each phase and of the step; sampled tokens a second; and what the update's model FLOPs come to, a
        rank and second. `metrics` are those of the step."""
        found = {f"time/{name}": value for name, value in self.seconds.items()}
        found |= {"time/step": seconds, "time/tokens_per_second": metrics["tokens/step"] / seconds}
        if "train/tflop" in metrics:
            tflop = metrics["train/tflop"] * self.config.updates_per_step
            found["time/tflops_per_rank"] = tflop / self.seconds["update"] / self.parts.layout.world_size
        self.seconds = {}
        return found
