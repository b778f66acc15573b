"""The best layout for a model, a kind of GPU and their number: every candidate is planned by arithmetic, the best ones
are built."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ...config.errors import ConfigError
from ...config.root import Config
from ...exit_codes import UnusableInput
from .crew import Crew
from .hardware import GPU, Assumptions
from .plan import Model, Plan, UnplannableError, make_plan

TENSOR = (1, 2, 4, 8)
SHARES = (0.25, 0.375, 0.5, 0.625, 0.75)
"""Of the nodes, for the servers; with a single node, of its GPUs."""
BUILT = 5
"""Candidates that are built, at most, until one fits."""


@dataclass(frozen=True)
class Found:
    """A candidate and its plan."""

    plan: Plan

    @property
    def overrides(self) -> list[str]:
        """What makes the given config this candidate."""
        config, parallel = self.plan.config, self.plan.config.parallel
        found = [
            f"parallel.dp={self.plan.policy.dp}",
            f"parallel.tp={parallel.tp}",
            f"parallel.pp={parallel.pp}",
            f"parallel.sequence_parallel={'true' if parallel.sequence_parallel else 'false'}",
            f"model.recompute={config.model.recompute}",
        ]
        if self.plan.crew.serving:
            pool = config.servers.policy
            found += [f"servers.pools.policy.tp={pool.tp}", f"servers.pools.policy.count={pool.count}"]
        return found


def search(config: Config, model: Model, gpu: GPU, gpus: int, assumptions: Assumptions) -> list[Found]:
    """The fastest layouts that fit, best first; the first was built. UnusableInput when none fits, with the one that
    comes nearest."""
    plans: list[Plan] = []
    nearest: Plan | None = None
    for candidate, crew in _candidates(config, model, gpu, gpus):
        try:
            plan = make_plan(candidate, model, gpu, crew, assumptions, built=False)
        except UnplannableError:
            continue
        if not plan.problems:
            plans.append(plan)
        elif nearest is None or _excess(plan) < _excess(nearest):
            nearest = plan
    plans.sort(key=lambda plan: (plan.times.total, plan.config.parallel.pp, plan.config.parallel.tp))
    for index, plan in enumerate(plans[:BUILT]):
        built = make_plan(plan.config, model, gpu, plan.crew, assumptions)
        if not built.problems:
            return [Found(built), *(Found(other) for other in plans[index + 1 :])]
    why = "" if nearest is None else f" The nearest: {'; '.join(nearest.problems)}"
    raise UnusableInput(f"no layout of {gpus} x {gpu.name} holds {config.model.path} and its servers.{why}")


def _excess(plan: Plan) -> int:
    return max(rank.peak for rank in plan.ranks)


def _candidates(config: Config, model: Model, gpu: GPU, gpus: int) -> Iterator[tuple[Config, Crew]]:
    """Layouts that divide the model and the GPUs evenly; what cannot work beyond that, planning finds."""
    layers = int(model.hf["num_hidden_layers"])
    for serving, server_tp in _servings(config, gpu, gpus):
        trainers = gpus if config.servers.colocated else gpus - serving
        for tp in TENSOR:
            for pp in range(1, layers + 1):
                if layers % pp or trainers % (tp * pp):
                    continue
                for recompute in ("none", "full"):
                    found = _changed(config, tp, pp, trainers // (tp * pp), recompute, serving, server_tp, gpu)
                    if found is not None:
                        yield found, Crew(trainers, serving, server_tp, shared=config.servers.colocated)


def _servings(config: Config, gpu: GPU, gpus: int) -> Iterator[tuple[int, int]]:
    """(GPUs that serve, tensor-parallel size of a server)."""
    if config.rollout.engine != "sglang":
        yield 0, config.servers.policy.tp
        return
    if config.servers.colocated:
        yield from ((gpus, tp) for tp in TENSOR if min(gpus, gpu.per_node) % tp == 0)
        return
    whole = gpu.per_node if gpus > gpu.per_node else 1
    for serving in sorted({round(share * gpus / whole) * whole for share in SHARES}):
        for tp in TENSOR:
            if 0 < serving < gpus and min(serving, gpu.per_node) % tp == 0:
                yield serving, tp


def _changed(
    config: Config, tp: int, pp: int, dp: int, recompute: str, serving: int, server_tp: int, gpu: GPU
) -> Config | None:
    """`config` with another layout; None where its own rules refuse it."""
    tree = config.model_dump(mode="python")
    tree["parallel"] |= {
        "tp": tp, "pp": pp, "dp": dp, "vpp": 1, "stage_layers": None, "sequence_parallel": tp > 1,
    }  # fmt: skip
    tree["model"]["recompute"] = recompute
    pool = tree["servers"]["pools"]["policy"]
    pool |= {"tp": server_tp, "urls": []}
    pool["count"] = max(1, min(serving, gpu.per_node) // server_tp)
    try:
        return Config.model_validate(tree)
    except (ConfigError, ValueError):
        return None
