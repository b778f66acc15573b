"""Who does what: GPUs that train, and GPUs that serve rollouts."""

from __future__ import annotations

from dataclasses import dataclass

from ...config.root import Config
from ...exit_codes import UnusableInput


@dataclass(frozen=True)
class Crew:
    """GPUs by what they do."""

    trainers: int
    serving: int
    """0 where responses are sampled by the trainer itself, or replayed."""
    server_tp: int
    shared: bool = False
    """The same GPUs do both, in turns (`servers.colocated`)."""

    @property
    def servers(self) -> int:
        """SGLang servers."""
        return self.serving // self.server_tp

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.trainers if self.shared else self.trainers + self.serving


def crew_of(config: Config, gpus: int | None, rollout_gpus: int | None) -> Crew:
    """Shares `gpus` out. With `parallel.dp` given the trainer takes dp x tp x pp x cp of them and the servers the rest;
    with `auto` the servers take `rollout_gpus`, else those of one host, and the trainer the rest.

    UnusableInput when the numbers contradict each other.
    """
    parallel, pool = config.parallel, config.servers.policy
    one = parallel.model_ranks
    fixed = None if parallel.dp == "auto" else parallel.dp * one
    if config.rollout.engine != "sglang":
        if rollout_gpus:
            raise UnusableInput(
                f"--rollout-gpus {rollout_gpus}: rollout.engine = {config.rollout.engine!r} has no servers; omit it."
            )
        return Crew(gpus or fixed or one, 0, pool.tp)
    if config.servers.colocated:
        return _in_turns(config, gpus or fixed or one, fixed, rollout_gpus)
    serving = rollout_gpus
    if pool.urls:
        serving = len(pool.urls) * pool.tp
    elif serving is None:
        serving = gpus - fixed if gpus and fixed else pool.count * pool.tp
    trainers = gpus - serving if gpus else (fixed or one)
    if trainers < 1 or serving < 1:
        raise UnusableInput(
            f"--gpus {gpus}: the trainer would have {trainers} GPUs and the servers {serving}: give more, or"
            " fewer to one of them (--rollout-gpus, parallel.dp)."
        )
    return Crew(trainers, serving, pool.tp)


def _in_turns(config: Config, gpus: int, fixed: int | None, rollout_gpus: int | None) -> Crew:
    if rollout_gpus:
        raise UnusableInput(
            f"--rollout-gpus {rollout_gpus} with servers.colocated = true: servers run on the trainer's GPUs; omit it."
        )
    if fixed not in (None, gpus):
        raise UnusableInput(
            f"--gpus {gpus} with servers.colocated = true, but parallel.dp x tp x pp x cp = {fixed}: all of them train,"
            " and serve in turns."
        )
    return Crew(gpus, gpus, config.servers.policy.tp, shared=True)
