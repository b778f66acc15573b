"""`urlvr mcs`: train base policies without labels on votes, and say when each collapses and what that predicts."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megatron_urlvr.analysis.mcs import (
    DEFINITIONS,
    LABEL_FREE,
    CollapseStep,
    Concordance,
    collapse_step,
    concordance,
    mean_step,
    pass_gain,
    supervised_gain,
    threshold_sweep,
)
from megatron_urlvr.analysis.runs import RunError, RunRecord, load_run
from megatron_urlvr.analysis.study import plan_study, run_study
from megatron_urlvr.config.mcs import SUPERVISED, McsConfig
from megatron_urlvr.exit_codes import ExitCode, UnusableInput
from megatron_urlvr.run.folder import RunDir, write_bytes, write_json

ALL_DEFINITIONS = (*DEFINITIONS, LABEL_FREE)
PAPER, SMOOTHED = "paper", "smoothed"
PAPERS_RULE = {"smoothing": 1, "persistence": 1}
Runs = dict[tuple[str, str, int | None], RunRecord]
"""(setting, policy, seed) -> run."""
Replicate = tuple[str, int | None]
"""(policy, seed)."""
Gains = Mapping[Replicate, Mapping[str, float]]
"""Gains of each policy and seed, by name."""


def measure(config: McsConfig, path: Path, jobs: int | None, *, train: bool = True) -> int:
    """Run what is not done of the config's runs (unless `train` is false), then measure and compare. Returns the exit
    code. UnusableInput when there is nothing to measure."""
    code = run_study(config.study(), path, jobs) if train else int(ExitCode.DONE)
    if code == ExitCode.PREEMPTED:
        return code
    runs = _runs(config, path)
    found = compare(config, runs)
    folder = Path(config.dir)
    write_json(folder / "mcs.json", found)
    write_bytes(folder / "mcs.png", figure(config, runs, found))
    print(text(found), end="")
    print(f"written to {folder / 'mcs.json'} and {folder / 'mcs.png'}")
    return code


def _runs(config: McsConfig, path: Path) -> Runs:
    """The runs that have metrics. UnusableInput without any that votes."""
    out: Runs = {}
    for planned in plan_study(config.study(), path).runs:
        setting, _, policy = planned.run.partition(".")
        if not RunDir(planned.folder).metrics.exists():
            continue
        try:
            run = load_run(planned.folder)
        except RunError as error:
            raise UnusableInput(f"{planned.folder} cannot be read: {error}") from error
        if setting != SUPERVISED and run.supervised:
            raise UnusableInput(
                f"settings.{setting}: {planned.folder} trained with labels; a Model Collapse Step is that of label-free"
                " training, so take such overrides to `supervised`"
            )
        out[setting, policy, planned.config.run.seed if config.seeds else None] = run
    if not any(setting != SUPERVISED for setting, _, _ in out):
        raise UnusableInput(f"{config.dir} has no runs to measure yet: run `urlvr mcs {path}`")
    return out


def compare(config: McsConfig, runs: Runs) -> dict[str, Any]:
    """Steps of every run under every rule and definition, means over seeds, and concordance with gains. JSON-able."""
    gains = _gains(config, runs)
    return {
        "threshold": config.threshold,
        "definitions": {**DEFINITIONS, LABEL_FREE: "onset of monitor.collapse, default settings"},
        "gains": [{"policy": p, "seed": s, **each} for (p, s), each in gains.items()],
        "rules": {
            name: {**rule, "settings": {each: _compared(config, runs, gains, each, rule) for each in config.settings}}
            for name, rule in rules_of(config).items()
        },
    }


def rules_of(config: McsConfig) -> dict[str, dict[str, int]]:
    """What counts as below the threshold: the paper's rule always, and the config's own where it is another."""
    own = {"smoothing": config.smoothing, "persistence": config.persistence}
    return {PAPER: PAPERS_RULE} if own == PAPERS_RULE else {PAPER: PAPERS_RULE, SMOOTHED: own}


def _compared(config: McsConfig, runs: Runs, gains: Gains, setting: str, rule: Mapping[str, int]) -> dict[str, Any]:
    """One setting's runs under one rule."""
    mine = {(policy, seed): run for (name, policy, seed), run in runs.items() if name == setting}
    steps: dict[str, dict[Replicate, CollapseStep]] = {name: {} for name in ALL_DEFINITIONS}
    bases = {key: run.base_lines(config.eval_set) for key, run in mine.items()}
    listed = []
    for (policy, seed), run in mine.items():
        each = {name: collapse_step(run, name, threshold=config.threshold, **rule) for name in ALL_DEFINITIONS}
        for name, step in each.items():
            if step is not None:
                steps[name][policy, seed] = step
        listed.append(
            {
                "policy": policy,
                "seed": seed,
                "folder": str(run.path),
                "steps": {name: _jsonable(step) for name, step in each.items()},
                "sweep": threshold_sweep(run, config.sweep, **rule),
            }
        )
    return {
        "runs": listed,
        "policies": {name: _means(config, steps[name]) for name in ALL_DEFINITIONS},
        "concordance": {
            name: {gain: asdict(each) for gain, each in _concordances(steps[name], gains, bases).items()}
            for name in ALL_DEFINITIONS
        },
    }


def _gains(config: McsConfig, runs: Runs) -> Gains:
    out: dict[Replicate, dict[str, float]] = {}
    for (setting, policy, seed), run in runs.items():
        mine = out.setdefault((policy, seed), {})
        if setting == SUPERVISED and (gain := supervised_gain(run, config.eval_set)) is not None:
            mine["supervised gain"] = gain
        if (passed := pass_gain(run, config.eval_set)) is not None:
            mine.setdefault(*passed)
    return out


def _means(config: McsConfig, steps: Mapping[Replicate, CollapseStep]) -> dict[str, dict[str, Any]]:
    out = {}
    for policy in config.policies:
        mine = [step for (name, _), step in steps.items() if name == policy]
        if mine:
            mean, censored = mean_step(mine)
            tokens = float(np.mean([each.tokens for each in mine]))
            out[policy] = {"mean_step": mean, "censored": censored, "seeds": len(mine), "tokens": _finite(tokens)}
    return out


def _concordances(
    steps: Mapping[Replicate, CollapseStep], gains: Gains, bases: Mapping[Replicate, Mapping[str, float]]
) -> dict[str, Concordance]:
    """Concordance with each gain over (policy, seed), of the steps and of what `bases` says on the same pairs; clusters
    are seeds, since the snapshots of one seed come from one pretraining run; without seeds every policy is its own."""
    out = {}
    for name in dict.fromkeys(name for each in gains.values() for name in each):
        keys = [key for key in steps if name in gains.get(key, {})]
        if len(keys) > 1:
            out[name] = concordance(
                [steps[key].step for key in keys],
                [steps[key].censored for key in keys],
                [gains[key][name] for key in keys],
                [key[0] if key[1] is None else key[1] for key in keys],
                _columns([bases[key] for key in keys]),
            )
    return out


def _columns(lines: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """The evaluations that every base has: with fewer bases the pairs would be others."""
    return {name: [each[name] for each in lines] for name in lines[0] if all(name in each for each in lines)}


def _jsonable(step: CollapseStep | None) -> dict[str, Any] | None:
    return None if step is None else {**asdict(step), "tokens": _finite(step.tokens)}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def text(found: Mapping[str, Any]) -> str:
    """The figures for people; `> 100` marks a run, or a mean over some, that did not get there."""
    lines = []
    for name, rule in found["rules"].items():
        said = f"rule {name}: smoothing {rule['smoothing']}, persistence {rule['persistence']}"
        for setting, result in rule["settings"].items():
            lines.append(f"Model Collapse Steps, setting {setting}, below {found['threshold']:g}, {said}")
            lines += [*_table(result), ""]
    return "\n".join(lines)


def _table(result: Mapping[str, Any]) -> list[str]:
    """Lines on one setting under one rule."""
    lines = [f"  {'policy':<24}" + "".join(f"{name:>18}" for name in ALL_DEFINITIONS) + f"{'tokens':>14}"]
    for policy in dict.fromkeys(run["policy"] for run in result["runs"]):
        cells = [_cell(result["policies"][name].get(policy)) for name in ALL_DEFINITIONS]
        tokens = result["policies"]["reward_accuracy"].get(policy, {}).get("tokens")
        shown = "-" if tokens is None else f"{tokens:,.0f}"
        lines.append(f"  {policy:<24}" + "".join(f"{cell:>18}" for cell in cells) + f"{shown:>14}")
    for name, by_gain in result["concordance"].items():
        for gain, each in by_gain.items():
            lines.append(f"  concordance of {name} with {gain}: {_concordance_text(each)}")
            if each["pairs"]:
                lines += [f"    base {metric}: {_base_text(line)}" for metric, line in each["base"].items()]
    return lines


def _cell(mean: Mapping[str, Any] | None) -> str:
    if mean is None:
        return "-"
    return f"{'> ' if mean['censored'] else ''}{mean['mean_step']:.1f} ({mean['censored']}/{mean['seeds']} not)"


def _concordance_text(each: Mapping[str, Any]) -> str:
    if each["c"] is None:
        return f"no comparable pair among {each['policies']} policies"
    c = _with_interval(each["c"], each["low"], each["high"])
    return f"{c}, {each['pairs']} pairs, {each['policies']} policies in {each['clusters']} clusters"


def _base_text(each: Mapping[str, Any]) -> str:
    difference = _with_interval(each["difference"], each["difference_low"], each["difference_high"], sign="+")
    return f"{_with_interval(each['c'], each['low'], each['high'])} on the same pairs, step minus base {difference}"


def _with_interval(value: float, low: float | None, high: float | None, sign: str = "") -> str:
    interval = "" if low is None else f" [{low:{sign}.2f}, {high:{sign}.2f}]"
    return f"{value:{sign}.2f}{interval}"


def figure(config: McsConfig, runs: Runs, found: Mapping[str, Any]) -> bytes:
    """Reward accuracy over steps, and steps under the config's rule against the gain (arrows where censored), a row a
    setting."""
    from matplotlib.figure import Figure

    measured = list(found["rules"].values())[-1]["settings"]
    drawn = Figure(figsize=(10, 3.4 * len(config.settings)), layout="constrained")
    grid = drawn.subplots(len(config.settings), 2, squeeze=False)
    for (curves, scatter), setting in zip(grid, config.settings, strict=True):
        for k, policy in enumerate(config.policies):
            mine = [run for (name, which, _), run in runs.items() if (name, which) == (setting, policy)]
            for n, run in enumerate(mine):
                curve = run.curve(DEFINITIONS["reward_accuracy"])
                curves.plot(curve.steps, curve.values, color=f"C{k % 10}", lw=1, label=policy if n == 0 else None)
        curves.axhline(config.threshold, color="0.4", ls=":", lw=1)
        curves.set(xlabel="step", ylabel="reward accuracy of the vote", title=setting, ylim=(-0.02, 1.02))
        curves.legend(frameon=False, fontsize=7)
        _scatter(scatter, config, measured[setting]["runs"], found["gains"])
    target = io.BytesIO()
    drawn.savefig(target, format="png", dpi=130)
    return target.getvalue()


def _scatter(
    axes: Any, config: McsConfig, listed: Sequence[Mapping[str, Any]], gains: Sequence[Mapping[str, Any]]
) -> None:
    by_policy = {(each["policy"], each["seed"]): each.get("supervised gain") for each in gains}
    colours = {policy: f"C{k % 10}" for k, policy in enumerate(config.policies)}
    for run in listed:
        step, gain = run["steps"]["reward_accuracy"], by_policy.get((run["policy"], run["seed"]))
        if step is not None and gain is not None:
            marker = ">" if step["censored"] else "o"
            axes.plot(step["step"], gain, marker, color=colours[run["policy"]], ms=5)
    axes.set(xlabel="Model Collapse Step (arrows: not reached)", ylabel="gain of training with labels")
