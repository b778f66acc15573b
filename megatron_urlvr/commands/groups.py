"""Commands in groups: `urlvr config`, `rollout`, `data`, `bench`. Everything heavy is imported inside the command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_urlvr.commands.arguments import Checkpoint, ConfigFile, Overrides

config_app = typer.Typer(help="Look at configs.", no_args_is_help=True)
rollout_app = typer.Typer(help="Rollout servers.", no_args_is_help=True)
data_app = typer.Typer(help="Prompts.", no_args_is_help=True)
bench_app = typer.Typer(help="Benchmarks.", no_args_is_help=True)
APPS = {"config": config_app, "rollout": rollout_app, "data": data_app, "bench": bench_app}
"""By the name of the group."""


@rollout_app.command("serve")
def rollout_serve(
    config: ConfigFile,
    overrides: Overrides = None,
    pool: Annotated[str, typer.Option(help="Pool of servers.pools to serve.")] = "policy",
) -> None:
    """Start this host's SGLang servers and keep them running until the run is done."""
    import asyncio

    from megatron_urlvr.config.loader import load_config

    loaded = load_config(config, overrides or [])
    from megatron_urlvr.rollout.supervisor import serve

    raise typer.Exit(asyncio.run(serve(loaded, pool)))


@rollout_app.command("status")
def rollout_status(run: Annotated[Path, typer.Argument(help="Folder of a run.", metavar="RUN")]) -> None:
    """List a run's servers: where they are, whether they answer, which weights they hold."""
    from megatron_urlvr.commands.rollout import print_status

    print_status(run)


@data_app.command("select")
def data_select(
    config: ConfigFile,
    overrides: Overrides = None,
    keep: Annotated[str, typer.Option(help="majority_wrong, majority_right, all_wrong or mixed.")] = "majority_wrong",
    votes: Annotated[int, typer.Option(min=1, help="Responses sampled for each prompt.")] = 64,
    out: Annotated[Path, typer.Option(help="JSON-lines file to write.")] = Path("selected.jsonl"),
    checkpoint: Checkpoint = None,
) -> None:
    """Write the training prompts on which a policy's votes are wrong, right or split to a file."""
    from megatron_urlvr.config.loader import load_config

    loaded = load_config(config, overrides or [])
    from megatron_urlvr.commands.data import select

    raise typer.Exit(select(loaded, keep=keep, votes=votes, out=out, checkpoint=checkpoint))


@config_app.command("show")
def config_show(
    file: Annotated[
        Path | None, typer.Argument(help="A config, or the folder of a run.", metavar="FILE", show_default=False)
    ] = None,
    overrides: Overrides = None,
    docs: Annotated[bool, typer.Option("--docs", help="Print every setting with its meaning and default.")] = False,
) -> None:
    """Print a config with all defaults filled in, or (--docs) what each setting means."""
    from megatron_urlvr.commands.show import show

    typer.echo(show(file, overrides or [], docs=docs), nl=False)


@bench_app.command(
    "kernels", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)
def bench_kernels(context: typer.Context) -> None:
    """Measure the kernels beside their peers, in one run. `--help` lists its options."""
    from megatron_urlvr.commands.bench import bench_kernels as run

    raise typer.Exit(run(context.args))
