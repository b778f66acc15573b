"""`urlvr launch`: a run handed to a cluster."""

from __future__ import annotations

import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from megatron_urlvr.exit_codes import ExitCode, UnusableInput

from .arguments import ConfigFile, Overrides
from .outputs import writing

if TYPE_CHECKING:
    from megatron_urlvr.config.root import Config
    from megatron_urlvr.launch.slurm import SlurmJob


class Where(StrEnum):
    """What NeMo-Run runs on."""

    LOCAL = "local"
    SLURM = "slurm"


app = typer.Typer(help="Hand a run to a cluster.", no_args_is_help=True)

Nodes = Annotated[int, typer.Option(min=1, help="Nodes of the trainer.")]
Ranks = Annotated[
    int | None, typer.Option(min=1, help="Ranks on each node. Without it: those of the layout, else one a GPU.")
]
Gpus = Annotated[int, typer.Option(min=0, help="GPUs of each node; 0: the job asks for none.")]
RolloutNodes = Annotated[int, typer.Option(min=0, help="Further nodes for rollout servers alone.")]
Time = Annotated[str, typer.Option(help="Time limit: minutes, HH:MM:SS or D-HH:MM:SS.")]
Signal = Annotated[int, typer.Option("--signal", min=1, help="Seconds before the time limit: save and be requeued.")]
Image = Annotated[str, typer.Option(help="Container image (pyxis).")]
Partition = Annotated[str, typer.Option(help="Slurm's partition. Without it: the cluster's default.")]
Account = Annotated[str, typer.Option(help="Account that the job is charged to. Without it: yours by default.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be submitted, and submit nothing.")]


@app.command()
def slurm(
    config: ConfigFile,
    overrides: Overrides = None,
    nodes: Nodes = 1,
    ranks_per_node: Ranks = None,
    gpus_per_node: Gpus = 8,
    rollout_nodes: RolloutNodes = 0,
    time: Time = "24:00:00",
    signal_s: Signal = 300,
    partition: Partition = "",
    rollout_partition: Annotated[str, typer.Option(help="Without it: --partition.")] = "",
    account: Account = "",
    qos: Annotated[str, typer.Option(help="Slurm's quality of service. Without it: the cluster's default.")] = "",
    seeds: Annotated[str, typer.Option(help="An array, one run a seed: 0-4, or 0-9%3 for three at once.")] = "",
    image: Image = "",
    mounts: Annotated[str, typer.Option(help="Its mounts. Without it: the current folder.")] = "",
    setup: Annotated[
        list[str] | None, typer.Option(help="A line of shell at the start of the job; may be repeated.")
    ] = None,
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="Evaluate the last checkpoint in a job after it.")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Write a run's batch script into its folder and submit it."""
    from megatron_urlvr.config.loader import load_config
    from megatron_urlvr.launch.needs import needs_of
    from megatron_urlvr.launch.needs import ranks_per_node as of_layout
    from megatron_urlvr.launch.slurm import SlurmJob, evaluation_of, render, submit, write

    loaded = load_config(config, overrides or [])
    needs = needs_of(config, overrides or [])
    ranks = ranks_per_node or of_layout(needs, nodes, gpus_per_node)
    _refuse_misfit(loaded, nodes * ranks, gpus_per_node)
    job = SlurmJob(
        name=loaded.run.name,
        arguments=tuple(map(shlex.quote, [str(config), *(overrides or [])])),
        run_dir=loaded.run.dir,
        nodes=nodes,
        ranks_per_node=ranks,
        gpus_per_node=gpus_per_node,
        rollout_nodes=rollout_nodes,
        servers=needs.servers and not rollout_nodes,
        time=time,
        signal_s=signal_s,
        partition=partition,
        rollout_partition=rollout_partition,
        account=account,
        qos=qos,
        seeds=seeds,
        image=image,
        mounts=mounts,
        setup=tuple(setup or ()),
    )
    jobs: list[SlurmJob] = [job, *([evaluation_of(job)] if evaluate else [])]
    scripts = [render(each) for each in jobs]  # nothing is written or submitted when one of them cannot be
    if dry_run:
        typer.echo("\n".join(scripts), nl=False)
        return
    before = ""
    for each in jobs:
        with writing(f"run.dir = {loaded.run.dir}"):
            path = write(each)
        before = submit(path, after=before, each=bool(seeds))
        typer.echo(f"{before}  {path}")


@app.command()
def nemo(
    config: ConfigFile,
    overrides: Overrides = None,
    executor: Annotated[Where, typer.Option(help="This machine, or a Slurm cluster.")] = Where.LOCAL,
    nodes: Nodes = 1,
    ranks_per_node: Ranks = None,
    gpus_per_node: Gpus = 8,
    rollout_nodes: RolloutNodes = 0,
    time: Time = "24:00:00",
    signal_s: Signal = 300,
    partition: Partition = "",
    account: Account = "",
    image: Image = "",
    restarts: Annotated[
        int, typer.Option(min=0, help="How often Slurm starts a run again that did not end well.")
    ] = 10,
    detach: Annotated[bool, typer.Option("--detach", help="Return when the job is submitted.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Launch a run with NeMo-Run, and wait for it. The job checks the config; here only what it needs is read."""
    from megatron_urlvr.launch import nemo

    recipe = nemo.Recipe(str(config), list(overrides or []))
    if executor is Where.LOCAL:
        if rollout_nodes or nodes > 1:
            raise UnusableInput("--nodes and --rollout-nodes need --executor slurm: this machine is one node.")
        made = nemo.experiment(recipe, nemo.build(nemo.local(ranks_per_node or nemo.AS_LAYOUT)))
    else:
        own: dict[str, Any] = {"account": account, "partition": partition or None, "time": time, "signal_s": signal_s}
        own |= {"gpus_per_node": gpus_per_node, "image": image or None, "restarts": restarts}
        trainer = nemo.build(nemo.slurm(nodes=nodes, ranks=ranks_per_node or nemo.AS_LAYOUT, **own))
        servers = nemo.build(nemo.slurm(nodes=rollout_nodes, **own)) if rollout_nodes else None
        made = nemo.experiment(recipe, trainer, servers)
    states = nemo.launch(made, detach=detach, dry_run=dry_run)
    typer.echo(" ".join(states))
    if not detach and not dry_run and set(states) != {"SUCCEEDED"}:
        raise typer.Exit(int(ExitCode.FAILED))


def _refuse_misfit(config: Config, ranks: int, gpus: int) -> None:
    """ConfigError says what keeps `ranks` processes from training it."""
    from megatron_urlvr.config.checks import check
    from megatron_urlvr.config.errors import ConfigError
    from megatron_urlvr.policy.hf.folder import read_config

    if not (Path(config.model.path) / "config.json").exists():
        print(f"model.path = {config.model.path} is not here: its layout is not checked.", file=sys.stderr)
        return
    device: Literal["cpu", "cuda"] = "cuda" if gpus else "cpu"
    problems = check(
        config, world_size=ranks, hf_config=read_config(config.model.path), tokenizer_size=None, device=device
    )
    if problems:
        raise ConfigError(problems)
