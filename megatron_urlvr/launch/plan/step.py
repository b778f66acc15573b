"""One step from generation to the weight sync, in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...config.root import Config
from .crew import Crew
from .memory import ServerMemory
from .shards import Shard
from .speed import TERA, Generation, Trainer, forward_flops, generation
from .sync import SyncPlan
from .workload import Workload


@dataclass(frozen=True)
class Times:
    """Seconds of a step by phase, and what they are made of."""

    generate: Generation | None
    """None where no server generates: the embedded engine is not modelled."""
    score: float
    train: float
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
    def total(self) -> float:
        """Seconds of a step, rewards and bookkeeping aside."""
        generate = 0.0 if self.generate is None else self.generate.seconds
        learn = self.score + self.train
        return (max(generate, learn) if self.overlapped else generate + learn) + self.sync


def generation_of(
    config: Config, crew: Crew, server: ServerMemory, trainer: Trainer, work: Workload, parameters: int
) -> Generation | None:
    """What the servers do in a step; None when their cache holds nothing."""
    if server.tokens <= 0:
        return None
    pool = config.servers.policy
    return generation(
        server,
        work,
        trainer.gpu,
        trainer.assumptions,
        servers=crew.servers,
        tp=pool.tp,
        concurrency=pool.concurrency,
        parameters=parameters,
        prompts=config.rollout.sampled,
    )


def step_times(
    trainer: Trainer,
    work: Workload,
    shards: Sequence[Shard],
    *,
    generate: Generation | None,
    sync: SyncPlan | None,
    overlapped: bool,
) -> Times:
    """Scoring over all votes, the update over the trained responses, and what others said of generation and sync."""
    policy, dp = trainer.policy, trainer.policy.dp
    flops = forward_flops(policy.hf, work.row)
    forward = work.row * policy.layers * (flops.layer + flops.attention) + work.response * flops.head
    score = sum(trainer.passes(work.votes / dp, work, training=False)[0] for _ in work.scoring)
    score += sum(trainer.passes(work.trained / dp, work, training=False)[0] for _ in work.rescoring)
    after: dict[str, float] = {}
    train, count = 0.0, 1
    if work.updates:
        one, count = trainer.passes(work.trained / dp / work.updates, work, training=True)
        largest = max(shards, key=lambda shard: shard.total)
        after = {name: seconds * work.updates for name, seconds in trainer.after_backward(largest).items()}
        train = one * work.updates + sum(after.values())
    possible = train * dp * policy.parallel.tp * policy.parallel.pp * trainer.gpu.tflops * TERA
    return Times(
        generate=generate,
        score=score,
        train=train,
        after_backward=after,
        sync=sum(sync.seconds.values()) if sync else 0.0,
        overlapped=overlapped,
        microbatches=count,
        bubble=trainer.bubble(count),
        model_flops=forward * (work.votes * len(work.scoring) + work.trained * (3 + len(work.rescoring))),
        train_mfu=3 * forward * work.trained / possible if possible else 0.0,
    )
