"""The training loop.

    prompts ─► feed (engine, ledger) ─► groups ─► grade ─► policy.score (only when a reward needs it)
                                                     │
    engine ◄─ weights ◄─ policy.update ◄─ advantage ◄─ reward        audit (labels) and metrics look on

With `rollout.max_staleness` the engine works on the next batches while this one is trained on: see `loop/feed.py`.
Every rank runs this. Each data-parallel replica owns its prompts; its leader speaks with the engine and hands the
groups to the replica. Rank 0 writes files. A signal is noticed between phases: the step in progress is given up, and
the last completed one is saved: `loop/progress.py`. How a run ends is in `run/endings.py`.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from contextlib import closing

import torch

from .config.checks import cautions
from .config.root import Config
from .distributed.exchange import hand_over
from .distributed.layout import joined, world_size_from_environment
from .evaluate import Evaluator
from .loop.assembly import Parts, build, preflight
from .loop.batching import mini_batches, reward_groups, rows_to_train_on, score_groups
from .loop.progress import Progress
from .loop.step_metrics import step_metrics
from .policy.batch import Row
from .policy.optimizer import learning_rate
from .rewards.combine import RewardResult
from .rollout.faults import Abandoned, RolloutFailed
from .run.endings import ended_before_it_began, run_to_its_end
from .run.files import RunFiles
from .run.interrupts import Interrupts
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


class Trainer(Progress):
    """One run on one rank."""

    def __init__(self, config: Config, parts: Parts, files: RunFiles, interrupts: Interrupts) -> None:
        super().__init__(config, parts, files, interrupts)
        self.evaluator = Evaluator(config, parts, files)
        self.groups: list[Group] = []
        """Groups of the step in progress."""

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
            metrics["tokens/total"] = self.tokens
            metrics |= self.watch.observe(self.step, metrics)
            metrics |= self.serve(metrics)
            self.complete(metrics | self.timings(metrics, time.perf_counter() - started))
            self.save_if_due()
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
            metrics = self.observe(groups, results, step)
        if self.config.rollout.record or self.config.run.rollout_only:
            self.files.record(step, groups)
        self.heed_signals()
        if not self.config.run.rollout_only:
            with self.phase("update"):
                rows, selected = rows_to_train_on(self.config, self.parts, groups, results)
                metrics |= selected | self.update(rows)
            self.version += 1
        return metrics

    def observe(self, groups: list[Group], results: list[RewardResult], step: int) -> dict[str, float]:
        """Metrics of the rollouts, the audit, and what the collapse detector looks at."""
        due, parts = self.evaluator.due(step), (self.config, self.parts, self.feed)
        return step_metrics(*parts, groups, results, version=self.version, divergence=due) | self.watch.signals(groups)

    def update(self, groups: list[list[Row]]) -> dict[str, float]:
        """One optimizer step for each mini-batch; metrics are means over them."""
        steps, per_step, found = self.config.run.steps, self.config.updates_per_step, []
        for k, rows in enumerate(mini_batches(self.config, self.parts.layout, groups), self.step * per_step):
            lr = learning_rate(self.config.optim, k, steps=steps, per_step=per_step)
            found.append(self.parts.policy.update(rows, self.parts.loss, lr=lr))
            self.untouched = False
        return {name: math.fsum(each[name] for each in found) / len(found) for name in found[0]}

    def push_weights(self) -> None:
        """Stream the policy's weights to the engine."""
        hand_over(self.parts.policy, self.parts.engine, self.parts.layout, version=self.version)

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
