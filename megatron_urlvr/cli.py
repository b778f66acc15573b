"""The commands. Parses and dispatches; everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_urlvr.commands import groups
from megatron_urlvr.commands.arguments import Checkpoint, ConfigFile, Overrides, StudyDryRun
from megatron_urlvr.commands.launch import app as launch_app
from megatron_urlvr.distributed.ranks import adopt_srun
from megatron_urlvr.exit_codes import DISK_FULL, ExitCode, UnusableInput
from megatron_urlvr.rollout.faults import RolloutFailed

app = typer.Typer(
    help="Unsupervised reinforcement learning with verifiable rewards, on Megatron-Core and SGLang.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for name, group in {**groups.APPS, "launch": launch_app}.items():
    app.add_typer(group, name=name)


@app.command()
def train(config: ConfigFile, overrides: Overrides = None) -> None:
    """Train a policy. A run that was interrupted continues; Ctrl-C leaves it resumable."""
    from megatron_urlvr.config.loader import load_config

    loaded = load_config(config, overrides or [])
    from megatron_urlvr.train import main as run

    raise typer.Exit(run(loaded))


@app.command()
def pretrain(config: ConfigFile, overrides: Overrides = None) -> None:
    """Make small base policies by next-token prediction."""
    from megatron_urlvr.config.loader import load_config
    from megatron_urlvr.config.pretrain import PretrainConfig

    loaded = load_config(config, overrides or [], PretrainConfig)
    from megatron_urlvr.pretrain import main as run

    raise typer.Exit(run(loaded))


@app.command("eval")
def evaluate(
    config: ConfigFile,
    overrides: Overrides = None,
    checkpoint: Checkpoint = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="A set of eval.sets; may be repeated. Without it: all.")
    ] = None,
    rewards: Annotated[
        list[str] | None,
        typer.Option(
            "--reward", help="Say how this reward, or term, goes with correctness; may be repeated, or `all`."
        ),
    ] = None,
) -> None:
    """Measure a policy on the config's evaluation sets."""
    from megatron_urlvr.config.errors import did_you_mean
    from megatron_urlvr.config.loader import load_config

    loaded = load_config(config, overrides or [])
    known = loaded.eval.sets
    if wrong := [name for name in sets or [] if name not in known]:
        raise UnusableInput(
            f"--set {wrong[0]}: the config has no such evaluation set.{did_you_mean(wrong[0], known)}"
            f" Known: {', '.join(known) or 'none'}."
        )
    from megatron_urlvr.commands.evaluate import main as run

    raise typer.Exit(run(loaded, checkpoint, sets or None, rewards))


@app.command()
def compare(
    one: Annotated[Path, typer.Argument(help="A table of problems, RUN/evals/eval_*.problems.jsonl.", metavar="ONE")],
    other: Annotated[Path, typer.Argument(help="Another policy's, on the same set.", metavar="OTHER")],
) -> None:
    """Compare two policies problem by problem, with an interval from resampling problems in pairs."""
    from megatron_urlvr.commands.compare import print_comparison

    print_comparison(one, other)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.", metavar="RUN")],
    out: Annotated[Path | None, typer.Option(help="Where the page goes. Without it: the run's report folder.")] = None,
) -> None:
    """Write one HTML page with figures about one or several runs."""
    from megatron_urlvr.analysis.report import write_report
    from megatron_urlvr.commands.outputs import writing

    with writing("the report" if out is None else f"--out {out}"):
        typer.echo(str(write_report(runs, out)))


@app.command()
def study(
    grid: Annotated[Path, typer.Argument(help="A study's YAML file.", metavar="STUDY")],
    overrides: Overrides = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at once. Without it: as the study says.")] = None,
    report: Annotated[bool, typer.Option("--report", help="Report on what is there, and run nothing.")] = False,
    dry_run: StudyDryRun = False,
) -> None:
    """Run a list of configs, one report on all of them. Continues where it was interrupted."""
    from megatron_urlvr.config.loader import load_config
    from megatron_urlvr.config.study import StudyConfig

    loaded = load_config(grid, overrides or [], StudyConfig)
    if dry_run:
        from megatron_urlvr.analysis.study import commands_of

        print(*commands_of(loaded, grid), sep="\n")
    elif report:
        from megatron_urlvr.analysis.study import report_study

        report_study(loaded, grid)
    else:
        from megatron_urlvr.analysis.study import run_study

        raise typer.Exit(run_study(loaded, grid, jobs))


@app.command()
def rewards(
    names: Annotated[
        list[str] | None, typer.Argument(help="Rewards to describe. Without any: all.", metavar="NAME")
    ] = None,
) -> None:
    """List the rewards: formula, needs, range, options, source."""
    from megatron_urlvr.commands.rewards import rewards_text

    typer.echo(rewards_text(names or []), nl=False)


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(help="Folder that holds runs, at any depth.", metavar="DIR")] = Path("runs"),
) -> None:
    """List runs: reward, seed, steps, start, peak, end, verdict and state."""
    from megatron_urlvr.commands.runs import print_runs

    print_runs(folder)


@app.command()
def collapse(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or ones above them.", metavar="RUN")],
    patience: Annotated[int, typer.Option(min=1, help="Suspicious steps in a row before the alarm.")] = 3,
    window: Annotated[int, typer.Option(min=1, help="Each signal is the median of its last values.")] = 3,
    baseline: Annotated[int, typer.Option(min=2, help="First steps, which say what is normal.")] = 5,
    step: Annotated[int, typer.Option(min=0, help="Compare: always end at this step.")] = 20,
    entropy: Annotated[float, typer.Option(min=0, help="Compare: end at this entropy a token, in nats.")] = 0.3,
    majority: Annotated[float, typer.Option(min=0, max=1, help="Compare: end at this majority ratio.")] = 0.9,
    out: Annotated[Path | None, typer.Option(help="Write it as JSON too.")] = None,
) -> None:
    """Say when the label-free detector would have stopped runs, and what labels say about that."""
    from megatron_urlvr.commands.collapse import print_detections
    from megatron_urlvr.config.monitor import CollapseSection

    settings = CollapseSection(patience=patience, window=window, baseline_steps=baseline)
    print_detections(runs, settings=settings, step=step, entropy=entropy, majority=majority, out=out)


@app.command()
def mcs(
    config: Annotated[
        Path, typer.Argument(help="A YAML file of policies to compare, see docs/mcs.md.", metavar="CONFIG")
    ],
    overrides: Overrides = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at once. Without it: as the file says.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure what is there, and train nothing.")] = False,
    dry_run: StudyDryRun = False,
) -> None:
    """Measure the Model Collapse Step of base policies. Continues where it was interrupted."""
    from megatron_urlvr.config.loader import load_config
    from megatron_urlvr.config.mcs import McsConfig

    loaded = load_config(config, overrides or [], McsConfig)
    if dry_run:
        from megatron_urlvr.analysis.study import commands_of

        print(*commands_of(loaded.study(), config), sep="\n")
        return
    from megatron_urlvr.commands.mcs import measure as run

    raise typer.Exit(run(loaded, config, jobs, train=not measure))


@app.command()
def theory(
    weights: Annotated[str, typer.Option("--policy", help="Chances of the answers.")] = "0.4,0.35,0.25",
    beta: Annotated[float, typer.Option(min=1e-3, help="Weight of the KL penalty.")] = 1.0,
    eta: Annotated[float, typer.Option(min=0, max=1, help="How far a partial step goes.")] = 0.1,
    votes: Annotated[int, typer.Option(min=1, help="Samples of a finite vote.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Updates.")] = 30,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampled votes.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for theory.json and theory.png.")] = None,
) -> None:
    """Sharpening in exact tabular policies, beside its closed forms."""
    from megatron_urlvr.commands.theory import print_theory

    try:
        table = [float(part) for part in weights.split(",")]
    except ValueError:
        raise UnusableInput(f"--policy {weights}: must be numbers with commas between, such as 0.6,0.4.") from None
    print_theory(table, beta=beta, eta=eta, votes=votes, steps=steps, seed=seed, out=out)


@app.command()
def samples(
    run: Annotated[Path, typer.Argument(help="Folder of a run.", metavar="RUN")],
    step: Annotated[int | None, typer.Option(min=0, help="Step. Without it: the last that was kept.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Only prompts whose id or text contains this.")] = None,
    sort: Annotated[
        str, typer.Option(help="index, reward, length or correct; -reward for the highest first.")
    ] = "index",
    limit: Annotated[int, typer.Option(min=1, help="Most samples to print.")] = 50,
) -> None:
    """Print what the policy answered at a step."""
    from megatron_urlvr.commands.samples import print_samples

    print_samples(run, step=step, prompt=prompt, sort=sort, limit=limit)


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(help="A Hugging Face folder, or a Megatron checkpoint (a run's too).", metavar="SOURCE")
    ],
    target: Annotated[Path, typer.Argument(help="The folder to make.", metavar="TARGET")],
    model: Annotated[
        Path | None,
        typer.Option(help="Folder with config.json and tokenizer. Without it: the checkpoint's, its run's."),
    ] = None,
    max_shard_gb: Annotated[float, typer.Option(min=0.001, help="Largest safetensors file, in 10^9 bytes.")] = 4.0,
) -> None:
    """Convert Hugging Face <-> Megatron; under torchrun the ranks share the work."""
    from megatron_urlvr.commands.convert import convert as run

    done = run(source, target, model=model, max_shard_gb=max_shard_gb)
    if os.environ.get("RANK", "0") == "0":
        typer.echo(done)


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option(help="A100-80GB, H100-80GB or H200-141GB, in nodes of eight.")] = "H100-80GB",
    gpus: Annotated[
        int | None, typer.Option(min=1, help="GPUs in all. Without it: as many as the config asks.")
    ] = None,
    rollout_gpus: Annotated[
        int | None, typer.Option(min=1, help="GPUs that serve rollouts. Without it: all that do not train.")
    ] = None,
    search: Annotated[bool, typer.Option("--search", help="Propose the fastest layout that fits.")] = False,
    assume: Annotated[list[str] | None, typer.Option(help="Replace an assumption: name=value.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a run needs and how long a step may take. Needs no GPU and no weights, only config.json."""
    from megatron_urlvr.commands.plan import plan as make

    raise typer.Exit(
        make(
            config,
            overrides or [],
            gpu=gpu,
            gpus=gpus,
            rollout_gpus=rollout_gpus,
            wanted=search,
            assumed=assume or [],
            as_json_text=json,
        )
    )


@app.command()
def doctor() -> None:
    """Say what this machine has, and what follows from it."""
    from megatron_urlvr.doctor import examine

    typer.echo(examine(), nl=False)


def main() -> None:
    """Entry point of `urlvr`. Unusable input (exit code 2), a lack of rollout servers (5) and a full disk (1) end with
    their sentences, never with a traceback."""
    adopt_srun(os.environ)
    try:
        app()
    except (UnusableInput, RolloutFailed) as error:
        if os.environ.get("RANK", "0") == "0":  # every rank finds the same
            print(error, file=sys.stderr)
        sys.exit(ExitCode.NO_SERVERS if isinstance(error, RolloutFailed) else ExitCode.UNUSABLE_INPUT)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        print(f"{error}: free some space and run the command again.", file=sys.stderr)
        sys.exit(ExitCode.FAILED)


if __name__ == "__main__":
    main()
