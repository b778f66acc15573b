"""What each training step is fed with: its prompts, and their groups, generated as far ahead as may be.

    prompts of steps s, s + 1, .. s + max_staleness ─► in the ledger? ─► groups of step s
                                                  └─► engine.start ─► ledger ─┘

The prompts of a step are the same whether it is generated ahead or not. The batch of step t is begun when the policy
has taken t - 1 - max_staleness steps or more, so that no token is older than `max_staleness` versions when it is
trained on, however often the weights change under a response. Groups are taken in the order of their steps, never in
that of their arrival, which would favour short responses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..config.root import Config
from ..distributed.exchange import derive_seed, largest, my_share, put_to_sleep
from ..monitor.audit import Sums
from ..rollout.engine import RolloutEngine
from ..rollout.ledger import Ledger
from ..types import Group, Prompt, Sampling, samples_of
from .assembly import Parts


@dataclass
class Batch:
    """This replica's part of one step."""

    prompts: list[Prompt]
    place: dict[str, Any]
    """The place in the stream of prompts after it."""
    groups: Iterator[Group] | None = None
    """On replica leaders, once it is begun."""


class Feed:
    """Groups for one step after the other."""

    def __init__(self, config: Config, parts: Parts, ledger: Ledger | None) -> None:
        """`ledger`: where finished groups are kept, on replica leaders of a run that keeps them."""
        self.config, self.parts, self.ledger = config, parts, ledger
        self.bound = config.rollout.max_staleness
        self.batches: dict[int, Batch] = {}
        self.place = parts.stream.state_dict()
        """The place in the stream of prompts after the last step that was taken."""
        self.counts: dict[str, float] = {}

    def take(self, step: int, *, version: int) -> list[Group]:
        """The graded groups of this replica's share of step `step`, trained by weights of `version`; what comes next
        is begun. RolloutFailed when no server is left. Servers on the trainer's own GPUs sleep when this returns."""
        last = max(step, min(step + self.bound, self.config.run.steps))
        for coming in range(step, last + 1):
            if coming not in self.batches:
                prompts = my_share(self.parts.stream.next(self.config.rollout.sampled), self.parts.layout)
                self.batches[coming] = Batch(prompts, self.parts.stream.state_dict())
        batch = self.batches[step]
        groups = self.parts.collect(batch.prompts, lambda engine: self._from(engine, step, version))
        if self.config.servers.colocated:
            put_to_sleep(self.parts.policy, self.parts.engine, self.parts.layout)
        del self.batches[step]
        self.place = batch.place
        return groups

    def _from(self, engine: RolloutEngine, step: int, version: int) -> Iterator[Group]:
        """The groups of `step`, on a replica's leader; every batch that was drawn is begun."""
        engine.begin_step(step)
        for coming, batch in self.batches.items():
            if batch.groups is None:
                batch.groups = self._begin(engine, coming, batch.prompts)
        batch, again = self.batches[step], list[Prompt]()
        assert batch.groups is not None
        for group in batch.groups:
            stale = [sample for sample in group.samples if version - sample.oldest > self.bound]
            if stale:
                self._count("rollout/stale_samples", len(stale))
                again.append(group.prompt)
            else:
                yield group
        if again:
            yield from self._sampled(engine, step, again)

    def _begin(self, engine: RolloutEngine, step: int, prompts: list[Prompt]) -> Iterator[Group]:
        """The finished groups of `step` that the ledger has, and the others from the engine."""
        known = {} if self.ledger is None else self.ledger.groups(step)
        finished = []
        for prompt in prompts:
            group = known.get(prompt.id)
            if group is not None and group.prompt.tokens == prompt.tokens and self._whole(group):
                finished.append(group)
        if self.ledger is not None:
            self._count("rollout/from_ledger", len(finished))
        had = {group.prompt.id for group in finished}
        rest = [prompt for prompt in prompts if prompt.id not in had]
        return _chained(finished, self._sampled(engine, step, rest) if rest else iter(()))

    def _whole(self, group: Group) -> bool:
        """All votes, or those that early voting leaves."""
        rollout = self.config.rollout
        return len(group) == rollout.n_votes or (rollout.early_voting and rollout.trained <= len(group))

    def _sampled(self, engine: RolloutEngine, step: int, prompts: list[Prompt]) -> Iterator[Group]:
        rollout = self.config.rollout
        seed = derive_seed(self.config.run.seed, "train", step)
        certain = rollout.trained if rollout.early_voting else None
        sampling = Sampling(rollout.n_votes, rollout.max_new_tokens, rollout.temperature, seed=seed, certain=certain)
        return engine.start(prompts, sampling, keep=lambda group: self._keep(step, group))

    def _keep(self, step: int, group: Group) -> None:
        ledger = self.ledger  # once: `forget_after` may take it away on the main thread meanwhile
        if ledger is not None:
            ledger.append(step, group)

    def _count(self, name: str, number: int) -> None:
        self.counts[name] = self.counts.get(name, 0.0) + number

    def counted(self) -> dict[str, float]:
        """What this replica counted since the last call: groups from the ledger, samples that were too old."""
        taken, self.counts = self.counts, {}
        return taken

    def age_sums(self, groups: Sequence[Group], version: int) -> Sums:
        """Sums of `rollout/age`, by how many versions tokens are older than the weights of `version` in the mean, and
        of `rollout/aged_tokens`, the share that is older at all. Empty where none can be."""
        if not self.bound:
            return {}
        spans = [span for sample in samples_of(groups) for span in sample.ages(version)]
        tokens = float(sum(count for _, count in spans))
        return {
            "rollout/age": (float(sum(age * count for age, count in spans)), tokens),
            "rollout/aged_tokens": (float(sum(count for age, count in spans if age > 0)), tokens),
        }

    def oldest_age(self, groups: Sequence[Group], version: int) -> dict[str, float]:
        """`rollout/age_max`, over all replicas; empty where it can only be 0. Every rank takes part."""
        if not self.bound:
            return {}
        mine = max((version - sample.oldest for sample in samples_of(groups)), default=0)
        return {"rollout/age_max": float(largest(mine, self.parts.layout))}

    # -- what a checkpoint commits ------------------------------------------------------------------------------------

    def forget_after(self, step: int) -> None:
        """The groups of later steps shall be sampled anew when the run goes on: it was rolled back, or ends at a batch
        that it must not meet again. What is under way is kept no more."""
        ledger, self.ledger = self.ledger, None
        if ledger is not None:
            for known in ledger.steps():
                if known > step:
                    ledger.discard(known)

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream of prompts after the last step that was taken."""
        return self.place

    def load_state_dict(self, place: Mapping[str, Any]) -> None:
        """Go on from `place`."""
        self.parts.stream.load_state_dict(dict(place))
        self.place = self.parts.stream.state_dict()
        self.batches.clear()


def _chained(first: list[Group], then: Iterator[Group]) -> Iterator[Group]:
    yield from first
    yield from then
