"""Launch a recipe with NeMo-Run's own command line, which can change every setting of recipe and executor:

    python examples/nemo_run/launch.py --yes recipe=quickstart run.executor=local run.executor.ntasks_per_node=2
    python examples/nemo_run/launch.py --yes recipe=quickstart "recipe.overrides=['run.steps=20']" \
        run.executor=slurm run.executor.account=me run.executor.nodes=2

and with a second executor a heterogeneous job, whose second group serves rollouts:

    python examples/nemo_run/launch.py --yes recipe=quickstart_sglang run.executor=slurm rollout=slurm rollout.nodes=1

`urlvr launch nemo` does the same with options instead of assignments.
"""

import nemo_run as run

from megatron_urlvr.launch import nemo


@run.cli.entrypoint(namespace="urlvr", type="experiment")
def train(ctx: run.cli.RunContext, recipe: nemo.Recipe, rollout: run.Executor | None = None) -> None:
    """Train a recipe."""
    nemo.launch(nemo.experiment(recipe, ctx.executor, rollout), detach=ctx.detach, dry_run=ctx.dryrun)


if __name__ == "__main__":  # NeMo-Run may import this file again
    run.cli.main(train)
