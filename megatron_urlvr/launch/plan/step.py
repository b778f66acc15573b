"""One step from generation to the weight sync, in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .generate import Generation
from .providers import Answered
from .shards import Shard
from .speed import TERA, Trainer, forward_flops
from .sync import SyncPlan
from .workload import Rows, Workload


@dataclass(frozen=True)
class Times:
    """Seconds of a step by phase, and what they are made of."""

    generate: Generation | None
    """None where no server generates: the embedded engine is not modelled."""
    asked: list[Answered]
    """What providers ask for, one after the other."""
    score: float
    swaps: float
    """Of `score`: bringing the reference or the moving average in."""
    train: float
    lessons: float
    """Of `train`, about: what is trained on beside responses, by its tokens' FLOPs."""
    after_backward: dict[str, float]
    sync: float
    overlapped: bool
    """Generation runs beside training (`rollout.max_staleness` above 0)."""
    microbatches: int
    bubble: float
    model_flops: float
    """Of scoring and training one step, without recomputation."""
    train_mfu: float
    """Model FLOPs of the update over what its GPUs could do in its time."""

    @property
    def ask(self) -> float:
        """Seconds that providers wait for answers."""
        return sum(each.seconds or 0.0 for each in self.asked)

    @property
    def total(self) -> float:
        """Seconds of a step, rewards and bookkeeping aside. What the policy's servers answer to providers, they do not
        generate meanwhile."""
        shared = sum(each.seconds or 0.0 for each in self.asked if each.asked.of_policy)
        generate = 0.0 if self.generate is None else self.generate.seconds
        learn = self.ask - shared + self.score + self.train
        return shared + (max(generate, learn) if self.overlapped else generate + learn) + self.sync


def step_times(
    trainer: Trainer,
    work: Workload,
    shards: Sequence[Shard],
    *,
    generate: Generation | None,
    asked: list[Answered],
    sync: SyncPlan | None,
    overlapped: bool,
) -> Times:
    """Scoring over all votes, the update over the trained responses and lessons, and what others said of generation,
    providers and sync."""
    policy = trainer.policy
    swaps = work.swaps * max(trainer.swap(shard) for shard in shards)
    score = sum(trainer.passes([work.sampled_rows], training=False)[0] for _ in work.scoring)
    score += sum(trainer.passes(work.trained_rows, training=False)[0] for _ in work.rescoring)
    after: dict[str, float] = {}
    train, count = 0.0, 1
    if work.updates:
        share = work.epochs / work.updates
        rows = [Rows(each.count * share, each.prompt, each.response) for each in work.trained_rows]
        one, count = trainer.passes(rows, training=True)
        largest = max(shards, key=lambda shard: shard.total)
        after = {name: seconds * work.updates for name, seconds in trainer.after_backward(largest).items()}
        train = one * work.updates + sum(after.values())
    sampled, taught = _forward(trainer, [work.sampled_rows]), _forward(trainer, work.lessons)
    trained = _forward(trainer, work.trained_rows)
    possible = train * policy.replicas * policy.parallel.tp * policy.parallel.pp * trainer.gpu.tflops * TERA
    return Times(
        generate=generate,
        asked=asked,
        score=score + swaps,
        swaps=swaps,
        train=train,
        lessons=(train - sum(after.values())) * taught / trained,
        after_backward=after,
        sync=sum(sync.seconds.values()) if sync else 0.0,
        overlapped=overlapped,
        microbatches=count,
        bubble=trainer.bubble(count),
        model_flops=sampled * len(work.scoring) + trained * (3 * work.epochs + len(work.rescoring)),
        train_mfu=3 * trained * work.epochs / possible if possible else 0.0,
    )


def _forward(trainer: Trainer, rows: Sequence[Rows]) -> float:
    """FLOPs of one forward of `rows`."""
    total = 0.0
    for each in rows:
        flops = forward_flops(trainer.policy.hf, each.length)
        one = each.length * trainer.policy.layers * (flops.layer + flops.attention) + each.response * flops.head
        total += each.count * one
    return total
