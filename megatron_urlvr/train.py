"""The training loop.

    prompts ─► feed (engine, ledger) ─► groups ─► grade ─► policy.score (only when a reward needs it)
                                                     │
    engine ◄─ weights ◄─ policy.update ◄─ advantage ◄─ reward        audit (labels) and metrics look on

With `rollout.max_staleness` the engine works on the next batches while this one is trained on: see `loop/feed.py`.
Every rank runs this. Each data-parallel replica owns its prompts; its leader speaks with the engine and hands the
groups to the replica. Rank 0 writes files. A signal is noticed between phases: the step in progress is given up, and
the last completed one is saved. How a run ends is in `run/endings.py`.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any

import torch

from .config.checks import cautions
from .config.root import Config
from .data.labels import uses_of
from .distributed.exchange import any_rank, hand_over, merge_sums
from .distributed.layout import joined, world_size_from_environment
from .evaluate import Evaluator
from .loop.assembly import Parts, build, preflight
from .loop.batching import (
    divergence_from_start,
    lesson_metrics,
    mini_batches,
    reward_groups,
    score_groups,
    select_groups,
    training_rows,
)
from .loop.collapse_watch import Collapsed, CollapseWatch
from .loop.feed import Feed
from .loop.off_policy import compare, correction_metrics, of_the_policy
from .monitor.audit import audit_sums, merge, rates, rollout_sums, term_sums
from .policy.batch import Row
from .policy.optimizer import learning_rate
from .rewards.combine import RewardResult
from .rollout.faults import Abandoned, RolloutFailed
from .run.endings import ended_before_it_began, run_to_its_end
from .run.files import RunFiles
from .run.interrupts import Interrupts, Preempted
from .types import Group


def main(config: Config) -> int:
    """Train as `config` says; returns the exit code. Raises UnusableInput for what the user must change."""
    torch.set_num_threads(config.run.threads)
    preflight(config, world_size=world_size_from_environment())
    with (
        joined(config.parallel, device=config.run.device, seed=config.run.seed, run_dir=config.run.dir) as layout,
        RunFiles.opened(config, layout) as files,
        Interrupts(announce=layout.is_main).listening() as interrupts,
    ):
        if files.finished is not None:
            return files.finished
        for caution in cautions(config) if layout.is_main else ():
            print(f"warning: {caution}", file=sys.stderr, flush=True)
        try:
            parts = build(config, layout, interrupted=lambda: interrupts.received is not None)
        except (RolloutFailed, Abandoned) as error:
            return ended_before_it_began(error, layout)
        with closing(parts):
            return run_to_its_end(Trainer(config, parts, files, interrupts))


class Trainer:
    """One run on one rank."""

    def __init__(self, config: Config, parts: Parts, files: RunFiles, interrupts: Interrupts) -> None:
        self.config, self.parts, self.files, self.interrupts = config, parts, files, interrupts
        self.step = self.version = self.tokens = 0
        self.seconds: dict[str, float] = {}
        self.evaluator = Evaluator(config, parts, files)
        self.feed = Feed(config, parts, files.ledger)
        stale, snapshots = config.rollout.max_staleness, files.folder.snapshots
        self.watch = CollapseWatch(config.monitor.collapse, parts.layout, snapshots, staleness=stale)
        if parts.engine is not None:
            parts.engine.interrupted = lambda: interrupts.received is not None
        self.groups: list[Group] = []
        """Groups of the step in progress."""
        self.completed: dict[str, Any] | None = None
        """What a checkpoint of the last completed step keeps; None before step 0 is evaluated and logged."""
        self.untouched = True
        """The weights are those of the last completed step."""

    def run(self) -> None:
        """Resume, take every step, leave a checkpoint."""
        self.restore(self.files.begin(self.parts.fingerprints(), self.parts.policy))
        self.heed_signals()
        self.push_weights()
        if self.completed is None:
            self.complete(self.evaluator.run(0))
        while self.step < self.config.run.steps:
            self.files.commit(wait=False)
            self.keep_snapshot()
            started = time.perf_counter()
            metrics = self.take_step(self.step + 1)
            self.step += 1
            self.groups = []
            self.tokens += int(metrics["tokens/step"])
            metrics |= self.watch.observe(self.step, metrics)
            metrics |= self.serve(metrics)
            self.complete(metrics | self.timings(metrics["tokens/step"], time.perf_counter() - started))
            every = self.config.checkpoint.every
            if every and self.step % every == 0:
                self.save(wait=not self.config.checkpoint.background)
            self.watch.act()
        self.save()

    def take_step(self, step: int) -> dict[str, float]:
        """Generate, score, reward, update."""
        self.heed_signals()
        with self.phase("generate"):
            self.groups = groups = self.feed.take(step, version=self.version)
        self.heed_signals()
        with self.phase("score"):
            score_groups(self.config, self.parts, groups, trained=True)
        with self.phase("reward"):
            results = reward_groups(self.parts, groups)
            metrics = self.observe(groups, results, step) | compare(self.config, self.parts, groups)
        if self.config.rollout.record or self.config.run.rollout_only:
            self.files.record(step, groups)
        self.heed_signals()
        if not self.config.run.rollout_only:
            with self.phase("update"):
                trained, results, selected = select_groups(self.config, self.parts, groups, results)
                rows = training_rows(self.config, self.parts, trained, results)
                metrics |= selected | lesson_metrics(self.parts, trained)
                metrics |= correction_metrics(self.config, [row for each in rows for row in each], self.parts.layout)
                metrics |= self.update(rows)
            self.version += 1
        return metrics

    def serve(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Hand the new weights to the engine, and evaluate them where that is due; returns the metrics of both. Where
        servers fail in it, or a signal interrupts it, the step counts all the same, with `metrics` alone."""
        found: dict[str, float] = {}
        try:
            if not self.config.run.rollout_only:
                with self.phase("sync"):
                    self.push_weights()
            found |= self.parts.engine_metrics(self.feed.counted())
            if self.evaluator.due(self.step):
                with self.phase("eval"):
                    found |= self.evaluator.run(self.step)
        except (RolloutFailed, Abandoned):
            self.complete({**metrics, **found})
            self.watch.act()
            raise
        return found

    def observe(self, groups: list[Group], results: list[RewardResult], step: int) -> dict[str, float]:
        """Metrics of the rollouts, without labels, and the audit against them, over all replicas."""
        proxies, totals = [result.proxy for result in results], [result.total for result in results]
        correct = [self.parts.correctness(group, use="audit") for group in groups]
        tokens = float(sum(sample.length for group in groups for sample in group.samples))
        sums = [rollout_sums(groups, proxies, totals), term_sums(groups, results)]
        if not of_the_policy(self.config):
            sums[0].pop("policy/entropy", None)  # of another temperature, or other weights
        sums.append(audit_sums(groups, totals, correct))  # of the proxy its order counts, which small numbers lose
        if self.evaluator.due(step):
            sums.append(divergence_from_start(self.parts, groups))
        sums.append({"tokens/step": (tokens, 1.0 / self.parts.layout.dp)})
        sums.append(self.feed.age_sums(groups, self.version))
        metrics = rates(merge_sums(merge(sums), self.parts.layout)) | self.feed.oldest_age(groups, self.version)
        return metrics | self.watch.signals(groups)

    def update(self, groups: list[list[Row]]) -> dict[str, float]:
        """One optimizer step for each mini-batch; metrics are means over them."""
        per_step = self.config.updates_per_step
        found = []
        for k, rows in enumerate(mini_batches(self.config, self.parts.layout, groups)):
            update, steps = self.step * per_step + k, self.config.run.steps
            lr = learning_rate(self.config.optim, update, steps=steps, per_step=per_step)
            found.append(self.parts.policy.update(rows, self.parts.loss, lr=lr))
            self.untouched = False
        return {name: math.fsum(each[name] for each in found) / len(found) for name in found[0]}

    def push_weights(self) -> None:
        """Stream the policy's weights to the engine."""
        hand_over(self.parts.policy.export(), self.parts.engine, self.parts.layout, version=self.version)

    # -- what is complete, and what is not ----------------------------------------------------------------------------

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

    def timings(self, tokens: float, seconds: float) -> dict[str, float]:
        """Seconds of each phase and of the step, sampled tokens a second and in all."""
        phases = {f"time/{name}": value for name, value in self.seconds.items()}
        self.seconds = {}
        return phases | {"time/step": seconds, "time/tokens_per_second": tokens / seconds, "tokens/total": self.tokens}
