"""The training loop.

    prompts ─► engine.generate ─► groups ─► grade ─► policy.score (only when a reward needs it)
                                               │
    engine ◄─ weights ◄─ policy.update ◄─ advantage ◄─ reward        audit (labels) and metrics look on

Every rank runs this. Each data-parallel replica owns its prompts; its leader speaks with the engine and hands the
groups to the replica. Rank 0 writes files. A signal is noticed between phases: the step in progress is given up, and
the last completed one is saved.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from .assembly import Parts, build, preflight
from .batching import divergence_from_start, mini_batches, score_groups, training_rows, updates_per_step
from .config.root import Config
from .data.grading.annotate import annotate
from .evaluate import Evaluator
from .exchange import any_rank, derive_seed, merge_sums, my_share, share_groups
from .exit_codes import ExitCode, UnusableInput
from .interrupts import Interrupts, Preempted
from .layout import start, world_size_from_environment
from .monitor.audit import audit_sums, merge, rates, rollout_sums, term_sums
from .policy.batch import Row
from .policy.optimizer import NonFiniteError, learning_rate
from .rewards.base import LABEL
from .rewards.combine import RewardResult
from .run_files import RunFiles
from .types import Group, Prompt, Sampling


def main(config: Config) -> int:
    """Train as `config` says; returns the exit code. Raises UnusableInput for what the user must change."""
    torch.set_num_threads(config.run.threads)
    preflight(config, world_size=world_size_from_environment())
    layout = start(config.parallel, device=config.run.device, seed=config.run.seed)
    with RunFiles.opened(config, layout) as files, Interrupts().listening() as interrupts:
        parts = build(config, layout)
        try:
            return Trainer(config, parts, files, interrupts).run_to_its_end()
        finally:
            parts.close()


class Trainer:
    """One run on one rank."""

    def __init__(self, config: Config, parts: Parts, files: RunFiles, interrupts: Interrupts) -> None:
        self.config, self.parts, self.files, self.interrupts = config, parts, files, interrupts
        self.step = self.version = self.tokens = 0
        self.seconds: dict[str, float] = {}
        self.evaluator = Evaluator(config, parts, files)
        self.groups: list[Group] = []
        self.completed = self.state()

    def run_to_its_end(self) -> int:
        """`run`, with every way to end given its exit code, its status and what it must leave behind."""
        try:
            self.run()
        except Preempted:
            self.files.save(self.parts.policy, self.completed)
            reason = f"{self.interrupts.received or 'a signal'} received; the same command resumes after this step"
            return self._end("preempted", ExitCode.PREEMPTED, reason)
        except NonFiniteError as error:
            path = self.files.folder.path / "non_finite" / self.files.folder.rollouts(self.step + 1).name
            self.files.keep(path, self.groups)
            reason = f"step {self.step + 1}: {error}; the weights are those before it, the batch is kept in {path}"
            return self._end("failed", ExitCode.NON_FINITE, reason)
        except BaseException as error:
            code = ExitCode.UNUSABLE_INPUT if isinstance(error, UnusableInput) else ExitCode.FAILED
            self._end("failed", code, f"{type(error).__name__}: {error}")
            raise
        return self._end("done", ExitCode.DONE, f"{self.step} steps")

    def run(self) -> None:
        """Resume, take every step, leave a checkpoint."""
        self.restore(self.files.begin(self.parts.fingerprints(), self.parts.policy))
        self.push_weights()
        if self.step == 0:
            self.files.log(0, self.evaluator.run(0))
        while self.step < self.config.run.steps:
            started = time.perf_counter()
            metrics = self.take_step(self.step + 1)
            self.step += 1
            if self.evaluator.due(self.step):
                with self.phase("eval"):
                    metrics |= self.evaluator.run(self.step)
            self.tokens += int(metrics["tokens/step"])
            self.completed = self.state()
            self.files.log(self.step, metrics | self.timings(metrics["tokens/step"], time.perf_counter() - started))
            every = self.config.checkpoint.every
            if every and self.step % every == 0:
                self.files.save(self.parts.policy, self.completed)
        if not self.config.run.rollout_only:
            self.files.save(self.parts.policy, self.completed)

    def take_step(self, step: int) -> dict[str, float]:
        """Generate, score, reward, update, hand the new weights to the engine."""
        self.heed_signals()
        with self.phase("generate"):
            prompts = self.parts.stream.next(self.config.rollout.prompts)
            groups = self.groups = self.generate(my_share(prompts, self.parts.layout), step)
        self.heed_signals()
        with self.phase("score"):
            score_groups(self.config, self.parts, groups)
        with self.phase("reward"):
            self.reveal_labels(groups)
            results = self.parts.reward.score_groups(groups)
            metrics = self.observe(groups, results, step)
            rows = training_rows(self.config, self.parts, groups, [result.total for result in results])
        self.files.record(step, groups)
        self.heed_signals()
        if not self.config.run.rollout_only:
            with self.phase("update"):
                metrics |= self.update(rows)
            with self.phase("sync"):
                self.version += 1
                self.push_weights()
        return metrics

    def generate(self, prompts: list[Prompt], step: int) -> list[Group]:
        """Graded groups of this replica's prompts, on all its ranks."""
        rollout, engine, groups = self.config.rollout, self.parts.engine, None
        if engine is not None:
            engine.begin_step(step)
            seed = derive_seed(self.config.run.seed, "train", step)
            sampling = Sampling(rollout.n_votes, rollout.max_new_tokens, rollout.temperature, seed=seed)
            groups = sorted(engine.generate(prompts, sampling), key=lambda group: prompts.index(group.prompt))
        groups = share_groups(groups, self.parts.layout)
        annotate(groups, self.parts.grader_of)
        return groups

    def reveal_labels(self, groups: list[Group]) -> None:
        """For supervised rewards alone: whether each answer is right."""
        if LABEL in self.parts.reward.needs:
            for group in groups:
                right = self.parts.correctness(group, use="reward")
                if right is None:
                    raise UnusableInput(f"prompt {group.prompt.id!r} has no label, which the reward needs")
                group.signals["correct"] = right.float()

    def observe(self, groups: list[Group], results: list[RewardResult], step: int) -> dict[str, float]:
        """Metrics of the rollouts, without labels, and the audit against them, over all replicas."""
        totals = [result.total for result in results]
        correct = [self.parts.correctness(group, use="audit") for group in groups]
        tokens = float(sum(sample.length for group in groups for sample in group.samples))
        sums = [rollout_sums(groups, totals), term_sums(groups, results), audit_sums(groups, totals, correct)]
        if self.evaluator.due(step):
            sums.append(divergence_from_start(self.parts, groups))
        sums.append({"tokens/step": (tokens, 1.0 / self.parts.layout.dp)})
        return rates(merge_sums(merge(sums), self.parts.layout))

    def update(self, groups: list[list[Row]]) -> dict[str, float]:
        """One optimizer step for each mini-batch; metrics are means over them."""
        per_step = updates_per_step(self.config)
        found = []
        for k, rows in enumerate(mini_batches(self.config, self.parts.layout, groups)):
            lr = learning_rate(self.config.optim, self.step * per_step + k, self.config.run.steps * per_step)
            found.append(self.parts.policy.update(rows, self.parts.loss, lr=lr))
        return {name: math.fsum(each[name] for each in found) / len(found) for name in found[0]}

    def push_weights(self) -> None:
        """Stream the policy's weights to the engine; every rank drains the stream."""
        engine, stream = self.parts.engine, self.parts.policy.export()
        if engine is None:
            for _ in stream:
                pass
            return
        engine.begin_update(self.version)
        engine.update(stream)
        engine.end_update()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps besides weights, optimizer and random state. Sampling needs no state: its seeds come
        from the run's seed, the step and the sample."""
        stream = self.parts.stream.state_dict()
        uses = dict(self.parts.labels.uses)
        return {"step": self.step, "version": self.version, "tokens": self.tokens, "stream": stream, "labels": uses}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Continue after a checkpoint's step."""
        if state is not None:
            self.step, self.version, self.tokens = state["step"], state["version"], state["tokens"]
            self.parts.stream.load_state_dict(state["stream"])
            self.parts.labels.uses.update(state["labels"])
        self.completed = self.state()

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

    def _end(self, state: Any, code: ExitCode, reason: str) -> int:
        uses = self.parts.labels.uses
        self.files.write_labels(self.parts.reward.supervised, uses)
        self.files.end(state, self.step, exit_code=int(code), reason=reason)
        return int(code)
