"""NeMo-Run: configs as recipes, executors, and the experiment that trains one. Imported only when it is asked for.

A recipe names a config; what runs is `urlvr` itself, in the trainer's environment, which needs no NeMo-Run. On Slurm
its ranks are srun's, so no port is agreed on; on one machine torchrun starts them.
"""

# No `from __future__ import annotations` here: NeMo-Run evaluates annotations where it does not know our names.
import os
import secrets
import shlex
from dataclasses import dataclass, field
from typing import Any

from ..exit_codes import UnusableInput
from .needs import Needs, needs_of, ranks_per_node

try:
    import fiddle as fdl
    import nemo_run as run
except ImportError as error:
    raise UnusableInput(
        f"NeMo-Run cannot be imported ({error}): pip install 'megatron-urlvr[nemo]' in the environment that launches."
    ) from error

SERVER_HOSTS = "URLVR_SERVER_HOSTS"
"""Environment variable in which the trainer of a heterogeneous job finds the hosts of its servers."""
KEY = "URLVR_API_KEY"
GROUP_WAIT_S = 5
"""How often NeMo-Run's script looks after the two groups, and how long it waits for the other when one ends."""


@dataclass
class Recipe:
    """What to train."""

    config: str
    """YAML file, as seen from the folder of launch, which every node must see."""
    overrides: list[str] = field(default_factory=list)
    """Settings laid over it: `key=value`."""


ONE_NODE = "4 GPUs train and 4 serve."
RECIPES = {
    "quickstart": ("configs/quickstart.yaml", "The small policy that learns from its own certainty, on CPUs."),
    "quickstart_sglang": (
        "configs/quickstart_sglang.yaml",
        "The same with rollouts from SGLang servers: give it a rollout executor.",
    ),
    **{
        f"paper_{reward}": (
            f"configs/recipes/paper/{reward}.yaml",
            f"{about} on Qwen3-1.7B-Base and DAPO-17k; {ONE_NODE}",
        )
        for reward, about in {
            "majority_vote": "Majority voting",
            "self_certainty": "Self-certainty",
            "token_entropy": "Token entropy",
            "trajectory_entropy": "Trajectory entropy",
            "probability": "Probability",
            "ground_truth": "Labels",
        }.items()
    },
    "ttrl": (
        "configs/recipes/ttrl.yaml",
        f"Test-time training with 64 votes, 32 of them trained on; {ONE_NODE}",
    ),
    "test_time": (
        "configs/recipes/test_time.yaml",
        f"Test-time training on AMC23, whole in every step; {ONE_NODE}",
    ),
    "small_set": ("configs/recipes/small_set.yaml", f"32 problems for 600 steps; {ONE_NODE}"),
    "single_problem": ("configs/recipes/single_problem.yaml", f"One problem for 100 epochs; {ONE_NODE}"),
    "mcs": ("configs/recipes/mcs.yaml", f"One run towards a Model Collapse Step, default setting; {ONE_NODE}"),
    "mcs_aggressive": ("configs/recipes/mcs_aggressive.yaml", f"The same, aggressive setting; {ONE_NODE}"),
    "countdown_self_verification": (
        "configs/recipes/countdown/countdown_self_verification.yaml",
        f"Countdown, paid by the policy's own verdict; {ONE_NODE}",
    ),
    "qwen25_32b_4nodes": (
        "configs/recipes/qwen2.5-32b_4nodes.yaml",
        "Qwen2.5-32B on two nodes that train and two that serve.",
    ),
    "qwen25_72b_16nodes": (
        "configs/recipes/qwen2.5-72b_16nodes.yaml",
        "Qwen2.5-72B on eight nodes that train and eight that serve.",
    ),
    "llama31_70b_16nodes": (
        "configs/recipes/llama-3.1-70b_16nodes.yaml",
        "Llama-3.1-70B on eight nodes that train and eight that serve.",
    ),
}
"""Recipes that NeMo-Run's command line knows by name: their configs, and what its help says of them."""


def _register(name: str, config: str, about: str) -> None:
    """Make `recipe=<name>` stand for `config`."""

    def recipe() -> run.Config[Recipe]:
        return run.Config(Recipe, config=config)

    recipe.__name__ = recipe.__qualname__ = name
    recipe.__doc__ = about
    run.cli.factory(recipe)


for _name, (_config, _about) in RECIPES.items():
    _register(_name, _config, _about)


AS_LAYOUT = 0
"""Ranks on a node, until `experiment` knows the recipe: those of its layout."""


@run.cli.factory
def local(ranks: int = AS_LAYOUT) -> run.Config[run.Executor]:
    """`ranks` processes on this machine; 0: as many as the recipe's layout has, else one."""
    return run.Config(run.LocalExecutor, ntasks_per_node=ranks)


@run.cli.factory
def slurm(
    account: str = "",
    partition: str | None = None,
    nodes: int = 1,
    ranks: int = AS_LAYOUT,
    gpus_per_node: int = 8,
    time: str = "24:00:00",
    signal_s: int = 300,
    image: str | None = None,
    restarts: int = 10,
) -> run.Config[run.Executor]:
    """`ranks` of srun on each of `nodes`; 0: as the recipe's layout has them, else one a GPU. A run that is warned
    `signal_s` seconds before its time limit saves and is requeued, as it is after any failure, `restarts` times at
    most."""
    here = os.getcwd()
    return run.Config(
        run.SlurmExecutor,
        account=account,
        partition=partition,
        nodes=nodes,
        ntasks_per_node=ranks,
        gpus_per_node=gpus_per_node or None,
        time=time,
        signal=f"USR1@{signal_s}",  # without "B:", which would warn the batch script alone
        container_image=image,
        container_mounts=[f"{here}:{here}"] if image else [],
        tunnel=run.Config(run.LocalTunnel, job_dir=""),
        # Nothing is copied: jobs run in this folder, which their nodes see.
        packager=run.Config(run.PatternPackager, include_pattern="", relative_path=here, symlink_from_remote_dir=here),
        retries=restarts,
    )


def training(recipe: Recipe, *, servers: bool = False) -> run.Script:
    """The trainer's task; with `servers` one that takes rollouts from the other group of the job."""
    settings = [recipe.config, *recipe.overrides]
    command = shlex.join(["exec", "urlvr", "train", *settings])
    return run.Script(inline=f'{command} {OF_SERVERS} "servers.hosts=[${SERVER_HOSTS}]"' if servers else command)


OF_SERVERS = "rollout.engine=sglang servers.pools.policy.host=0.0.0.0"


def serving(recipe: Recipe) -> run.Script:
    """The task of one supervisor of rollout servers on each node of its group."""
    command = shlex.join(["exec", "urlvr", "rollout", "serve", recipe.config, *recipe.overrides])
    return run.Script(inline=f"{command} {OF_SERVERS}")


def experiment(recipe: Recipe, executor: run.Executor, rollout: run.SlurmExecutor | None = None) -> run.Experiment:
    """The experiment that trains `recipe` on `executor`; with `rollout` a heterogeneous Slurm job whose second group
    serves rollouts. UnusableInput where the executors do not fit each other or the recipe."""
    needs = needs_of(recipe.config, recipe.overrides)
    _fit(needs, executor)
    if needs.servers and rollout is None:
        raise UnusableInput(
            f"{recipe.config} takes rollouts from SGLang servers (rollout.engine), and this launch would start none: "
            "give them nodes (--rollout-nodes, a rollout executor), name running ones in servers.pools.policy.urls, or "
            "use `urlvr launch slurm`, which starts them on the trainer's own nodes."
        )
    made = run.Experiment("urlvr")
    if rollout is None:
        with made:
            made.add(training(recipe), executor=executor, name="train")
        return made
    if not isinstance(executor, run.SlurmExecutor):
        raise UnusableInput("a rollout executor makes a heterogeneous job, so that the trainer's must be Slurm's too.")
    if rollout.partition != executor.partition:
        raise UnusableInput(
            f"NeMo-Run gives both groups of a job the first one's partition ({executor.partition}), not"
            f" {rollout.partition}: use `urlvr launch slurm --rollout-nodes`, which does not."
        )
    # The key reaches the tasks through sbatch, which hands its environment on; a file would show it.
    os.environ.setdefault(KEY, secrets.token_hex(32))
    hosts = '"$(scontrol show hostnames "$SLURM_JOB_NODELIST_HET_GROUP_1" | paste -sd,)"'
    executor.env_vars[SERVER_HOSTS] = hosts  # NeMo-Run writes it unquoted into the batch script
    rollout.ntasks_per_node = 1  # a supervisor on each node
    for group in (executor, rollout):
        group.heterogeneous = True
    executor.wait_time_for_group_job, executor.monitor_group_job_wait_time = GROUP_WAIT_S, GROUP_WAIT_S
    with made:
        made.add([training(recipe, servers=True), serving(recipe)], executor=[executor, rollout], name="train")
    return made


def _fit(needs: Needs, executor: run.Executor) -> None:
    """Give the executor the ranks of the layout, where it does not say how many. UnusableInput where it says others."""
    slurm = isinstance(executor, run.SlurmExecutor)
    nodes = executor.nodes if slurm else 1
    if executor.ntasks_per_node == AS_LAYOUT:
        gpus = (executor.gpus_per_node or 0) if slurm else 0
        executor.ntasks_per_node = ranks_per_node(needs, nodes, gpus)
    started = nodes * executor.ntasks_per_node
    if started != needs.ranks and (needs.ranks is not None or started % needs.replica):
        raise UnusableInput(
            f"the layout of the config (parallel.dp x tp x pp x cp) takes "
            f"{needs.ranks or f'a multiple of {needs.replica}'} ranks, and {nodes} x {executor.ntasks_per_node} = "
            f"{started} would be started: leave the number of ranks out, or change the layout."
        )
    if not slurm:
        executor.launcher = "torchrun" if executor.ntasks_per_node > 1 else None


def build(config: run.Config) -> Any:
    """The object that a factory's config describes."""
    return fdl.build(config)


def launch(made: run.Experiment, *, detach: bool, dry_run: bool) -> list[str]:
    """Run it, or print what would be run. Returns the states of its jobs, once they have ended or were handed over."""
    with made:
        if dry_run:
            made.dryrun()
            return []
        made.run(detach=detach, tail_logs=not detach)
    status: dict[str, Any] = made.status(return_dict=True) or {}
    return [str(job["status"]).rpartition(".")[2] for job in status.values()]
