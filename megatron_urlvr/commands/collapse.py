"""`urlvr collapse`: what the label-free detector makes of finished runs, and how that stands beside labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_urlvr.analysis.detection import (
    Account,
    Detection,
    Rule,
    account,
    detect,
    detector_rule,
    fixed_step,
    threshold,
)
from megatron_urlvr.analysis.runs import RunRecord, load_run
from megatron_urlvr.config.monitor import CollapseSection
from megatron_urlvr.exit_codes import UnusableInput
from megatron_urlvr.run.folder import write_json

from .outputs import make_parent, writing
from .runs import find_runs

ENTROPY = "policy/sampled_entropy"


def print_detections(
    folders: Sequence[Path], *, settings: CollapseSection, step: int, entropy: float, majority: float, out: Path | None
) -> None:
    """Print each run's verdict, and the account of the detector beside three plain rules: end at a fixed step, at an
    entropy a token, at a majority ratio. `out` takes all of it as JSON. UnusableInput without runs."""
    runs = _load(folders)
    rules: dict[str, Rule] = {
        "detector": detector_rule(settings),
        f"step {step}": fixed_step(step),
        f"entropy <= {entropy:g}": threshold(ENTROPY, entropy, below=True),
        f"majority >= {majority:g}": threshold("vote/majority_ratio", majority, below=False),
    }
    found = {name: [detect(run, rule, settings if name == "detector" else None) for run in runs]
             for name, rule in rules.items()}  # fmt: skip
    for each in found["detector"]:
        print(_line(each))
    accounts = {name: account(each) for name, each in found.items()}
    if any(run.eval_sets for run in runs):
        print(
            "\nrule                false alarms / healthy [95 %]     detected / collapsing   median loss   kept share"
        )
        for name, result in accounts.items():
            print(_row(name, result))
    if out is not None:
        with writing(f"--out {out}"):
            write_json(make_parent(out, f"--out {out}"), _json(settings, found, accounts))
        print(f"written to {out}")


def _load(folders: Sequence[Path]) -> list[RunRecord]:
    paths = [path for folder in folders for path in find_runs(folder)]
    if not paths:
        raise UnusableInput(f"{', '.join(map(str, folders))}: no runs there; give folders of runs, or ones above them.")
    return [load_run(path, str(path)) for path in paths]


def _line(found: Detection) -> str:
    text = found.verdict.text if found.verdict is not None else "no rollouts were logged"
    if found.best is None or found.kept is None:
        return f"{found.run}\n  {text}"
    what = f"accuracy {found.start:.3f} at the start, {found.best:.3f} at its best, {found.end:.3f} at the end"
    kept = f"; {found.kept:.3f} at step {found.stop}, which a roll-back keeps" if found.stop is not None else ""
    return f"{found.run}\n  {text}\n  {what}{kept}"


def _row(name: str, each: Account) -> str:
    low, high = each.false_alarm_interval
    alarms = f"{each.false_alarms} / {each.healthy} [{low:.2f}, {high:.2f}]"
    share = "-" if each.median_kept_share is None else f"{each.median_kept_share:.0%} of {each.with_gain}"
    loss = "-" if each.median_loss is None else f"{each.median_loss:.3f}"
    return f"{name:<20}{alarms:<34}{f'{each.detected} / {each.collapsing}':<24}{loss:<14}{share}"


def _json(settings: CollapseSection, found: dict[str, list[Detection]], accounts: dict[str, Account]) -> dict[str, Any]:
    return {
        "settings": settings.model_dump(),
        "rules": {
            name: {
                "account": asdict(accounts[name]),
                "runs": [{**asdict(each), "loss": each.loss, "kept_share": each.kept_share} for each in detections],
            }
            for name, detections in found.items()
        },
    }
