"""`urlvr plan`: what a config needs on given GPUs, or the best layout for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import typer

from megatron_urlvr.config.loader import load_config
from megatron_urlvr.exit_codes import ExitCode, UnusableInput
from megatron_urlvr.launch.plan.crew import crew_of
from megatron_urlvr.launch.plan.hardware import assume, gpu_named
from megatron_urlvr.launch.plan.plan import Plan, load_model, make_plan
from megatron_urlvr.launch.plan.report import as_json, as_text
from megatron_urlvr.launch.plan.search import Found, search

SHOWN = 8
"""Candidates of a search that are printed."""


def plan(
    file: Path,
    overrides: Sequence[str],
    *,
    gpu: str,
    gpus: int | None,
    rollout_gpus: int | None,
    wanted: bool,
    assumed: Sequence[str],
    as_json_text: bool,
) -> int:
    """Print the plan of `file`; returns the exit code: 2 when it does not fit. `wanted`: search for a layout.

    UnusableInput for a layout that cannot work at all, with every reason.
    """
    config = load_config(file, overrides)
    kind, assumptions, model = gpu_named(gpu), assume(assumed), load_model(config)
    if wanted:
        if gpus is None:
            raise UnusableInput("--search needs --gpus, the number of GPUs to share out.")
        found = search(config, model, kind, gpus, assumptions)
        typer.echo(_found_json(found) if as_json_text else _found_text(found), nl=False)
        return int(ExitCode.DONE)
    made = make_plan(config, model, kind, crew_of(config, gpus, rollout_gpus), assumptions)
    typer.echo(_json(made) if as_json_text else as_text(made), nl=False)
    return int(ExitCode.UNUSABLE_INPUT if made.problems else ExitCode.DONE)


def _json(plan: Plan) -> str:
    return json.dumps(as_json(plan), indent=2) + "\n"


def _found_text(found: Sequence[Found]) -> str:
    lines = [as_text(found[0].plan), f"The fastest of {len(found)} layouts that fit (seconds a step, GPUs that serve):"]
    for candidate in found[:SHOWN]:
        made = candidate.plan
        lines.append(f"  {made.times.total:9.1f}  {made.crew.serving:4d}  {' '.join(candidate.overrides)}")
    return "\n".join(lines) + "\n"


def _found_json(found: Sequence[Found]) -> str:
    listed = [
        {"seconds": each.plan.times.total, "serve": each.plan.crew.serving, "overrides": each.overrides}
        for each in found[:SHOWN]
    ]
    return json.dumps({"best": as_json(found[0].plan), "layouts": listed}, indent=2) + "\n"
