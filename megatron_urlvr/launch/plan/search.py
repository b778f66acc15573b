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
from .mixture import mixture_of
from .plan import Model, Plan, UnplannableError, make_plan

TENSOR = (1, 2, 4, 8)
CONTEXT = (1, 2, 4, 8)
"""Context-parallel sizes, each looked at where the longest sequence fits in none of the smaller ones."""
EXPERT = (1, 2, 4, 8, 16)
"""Expert-parallel sizes of a mixture."""
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
            f"parallel.cp={parallel.cp}",
            f"parallel.ep={parallel.ep}",
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
    nearest: Plan | None = None
    for cp in CONTEXT:
        fitting, missed = _planned(config, model, gpu, gpus, cp, assumptions)
        for index, plan in enumerate(fitting[:BUILT]):
            built = make_plan(plan.config, model, gpu, plan.crew, assumptions)
            if not built.problems:
                return [Found(built), *(Found(other) for other in fitting[index + 1 :])]
        if missed is not None and (nearest is None or _excess(missed) < _excess(nearest)):
            nearest = missed
    why = "" if nearest is None else f" The nearest: {'; '.join(nearest.problems)}"
    raise UnusableInput(f"no layout of {gpus} x {gpu.name} holds {config.model.path} and its servers.{why}")


def _planned(
    config: Config, model: Model, gpu: GPU, gpus: int, cp: int, assumptions: Assumptions
) -> tuple[list[Plan], Plan | None]:
    """The plans that fit, the fastest first, and of the others the one that comes nearest."""
    plans: list[Plan] = []
    nearest: Plan | None = None
    for candidate, crew in _candidates(config, model, gpu, gpus, cp):
        try:
            plan = make_plan(candidate, model, gpu, crew, assumptions, built=False)
        except UnplannableError:
            continue
        if not plan.problems:
            plans.append(plan)
        elif nearest is None or _excess(plan) < _excess(nearest):
            nearest = plan
    plans.sort(key=lambda plan: (plan.times.total, plan.config.parallel.pp, plan.config.parallel.tp))
    return plans, nearest


def _excess(plan: Plan) -> int:
    return max(rank.peak for rank in plan.ranks)


def _candidates(config: Config, model: Model, gpu: GPU, gpus: int, cp: int) -> Iterator[tuple[Config, Crew]]:
    """Layouts that divide the model and the GPUs evenly; what cannot work beyond that, planning finds."""
    layers = int(model.hf["num_hidden_layers"])
    for serving, server_tp in _servings(config, gpu, gpus):
        trainers = gpus if config.servers.colocated else gpus - serving
        crew = Crew(trainers, serving, server_tp, shared=config.servers.colocated)
        for tp in TENSOR:
            for pp in range(1, layers + 1):
                if layers % pp or trainers % (tp * pp * cp):
                    continue
                for ep in _expert_parallel(model, trainers // (tp * pp)):
                    for recompute in ("none", "full"):
                        layout = {"tp": tp, "pp": pp, "cp": cp, "ep": ep, "dp": trainers // (tp * pp * cp)}
                        found = _changed(config, layout, recompute, crew, gpu)
                        if found is not None:
                            yield found, crew


def _expert_parallel(model: Model, ranks: int) -> list[int]:
    """Sizes that experts can be spread over; `ranks`: data- and context-parallel ones."""
    experts = mixture_of(model.hf).experts
    return [ep for ep in EXPERT if ep == 1 or (experts and experts % ep == 0 and ranks % ep == 0)]


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


def _changed(config: Config, layout: dict[str, int], recompute: str, crew: Crew, gpu: GPU) -> Config | None:
    """`config` with another layout; None where its own rules refuse it."""
    tree = config.model_dump(mode="python")
    tree["parallel"] |= layout | {"vpp": 1, "stage_layers": None, "sequence_parallel": layout["tp"] > 1}
    tree["model"]["recompute"] = recompute
    pool = tree["servers"]["pools"]["policy"]
    pool |= {"tp": crew.server_tp, "urls": []}
    pool["count"] = max(1, min(crew.serving, gpu.per_node) // crew.server_tp)
    try:
        return Config.model_validate(tree)
    except (ConfigError, ValueError):
        return None
