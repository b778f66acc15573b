"""What a study found, in numbers: every run's start, peak and end, apart for prompts that the base's majority had right
and wrong, and means over seeds with intervals. Written beside the report as `summary.json` and `summary.md`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .curves import FloatArray
from .peaks import ProblemAccuracy, evals_file, load_problem_accuracy, peak_step
from .runs import RunRecord, Series

# 97.5 % quantiles of Student's t by degrees of freedom, from 1.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_NORMAL = 1.959964


@dataclass(frozen=True)
class Part:
    """Accuracy on some problems of a set: at the start, at the whole set's peak step, at the end."""

    problems: int
    start: float
    peak: float
    end: float


@dataclass(frozen=True)
class RunSummary:
    """One run on one set. The peak's step is chosen on `select` where the study has it, else on the set itself."""

    seed: int | None
    peak_step: int
    all: Part
    label_right: Part | None
    """Problems on which the base's majority was right; None where there are none, or it was not recorded."""
    label_wrong: Part | None
    verdict: str
    proxy_start: float | None
    proxy_end: float | None


def summarise_run(run: RunRecord, measure: str, select: str | None = None) -> RunSummary | None:
    """None when the set was not evaluated."""
    found, summary = load_problem_accuracy(run.path, measure), run.summary(measure)
    if found is None or summary is None:
        return None
    selected = load_problem_accuracy(run.path, select) if select else None
    chosen = peak_step(selected or found, found)
    right = base_majority(run.path, measure)
    proxy = run.ends_of("reward/proxy") or (None, None)
    return RunSummary(
        seed=run.seed,
        peak_step=chosen,
        all=_part(found, np.ones(found.accuracy.shape[1], dtype=bool), chosen) or Part(0, 0.0, 0.0, 0.0),
        label_right=None if right is None else _part(found, right >= 0.5, chosen),
        label_wrong=None if right is None else _part(found, right < 0.5, chosen),
        verdict=summary.verdict,
        proxy_start=proxy[0],
        proxy_end=proxy[1],
    )


def base_majority(run: Path, eval_set: str) -> FloatArray | None:
    """Whether the base's majority was right on each problem, `[P]`, from step 0; None where it was not recorded."""
    with evals_file(run, eval_set).open(encoding="utf-8") as lines:
        first = json.loads(next(lines))
    return np.asarray(first["majority_right"], dtype=np.float64) if "majority_right" in first else None


def _part(found: ProblemAccuracy, members: Any, peak_step: int) -> Part | None:
    if not members.any():
        return None
    means = found.accuracy[:, members].mean(axis=1)
    at_peak = found.at(peak_step)[members].mean()
    return Part(int(members.sum()), float(means[0]), float(at_peak), float(means[-1]))


def mean_interval(values: Sequence[float]) -> tuple[float, float, float] | None:
    """(mean, low, high): Student's 95 % interval over seeds; None of fewer than two values."""
    if len(values) < 2:
        return None
    array = np.asarray(values, dtype=np.float64)
    half = _student(len(array) - 1) * float(array.std(ddof=1)) / len(array) ** 0.5
    return float(array.mean()), float(array.mean()) - half, float(array.mean()) + half


def _student(freedom: int) -> float:
    """97.5 % quantile of Student's t; beyond the table by its expansion around the normal one (Abramowitz and Stegun,
    26.7.5), which is right to three decimals there."""
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = _NORMAL
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def write_summary(series: Sequence[Series], folder: Path, *, measure: str | None, select: str | None) -> Path | None:
    """`summary.json` and `summary.md` in `folder`; None when nothing was evaluated. `measure`: None takes each run's
    first set."""
    rows: list[dict[str, Any]] = []
    for item in series:
        runs = []
        for run in item.runs:
            eval_set = measure or next(iter(run.eval_sets), None)
            if eval_set is not None and (each := summarise_run(run, eval_set, select)) is not None:
                runs.append(each)
        if runs:
            rows.append({"label": item.label, "runs": [asdict(run) for run in runs], "over_seeds": _over_seeds(runs)})
    if not rows:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    page = folder / "summary.md"
    page.write_text(_table(rows), encoding="utf-8")
    return page


def _over_seeds(runs: Sequence[RunSummary]) -> dict[str, dict[str, tuple[float, float, float] | None]]:
    """Means over seeds of start, peak and end, for all problems and the two parts."""
    out = {}
    for name in ("all", "label_right", "label_wrong"):
        parts = [part for run in runs if (part := getattr(run, name)) is not None]
        out[name] = {key: mean_interval([getattr(part, key) for part in parts]) for key in ("start", "peak", "end")}
    return out


def _table(rows: Sequence[dict[str, Any]]) -> str:
    columns = ("run", "seeds", "start", "peak (step)", "end", "label-right: start, peak, end")
    head = "| " + " | ".join((*columns, "label-wrong: start, peak, end", "proxy", "verdicts")) + " |"
    lines = [head, "|---" * 9 + "|"]
    for row in rows:
        runs = row["runs"]
        steps = ", ".join(str(run["peak_step"]) for run in runs)
        rose = sum(run["proxy_start"] is not None and run["proxy_end"] > run["proxy_start"] for run in runs)
        verdicts = [run["verdict"] for run in runs]
        counted = "; ".join(f"{verdicts.count(each)} {each}" for each in dict.fromkeys(verdicts))
        cells = [_cell(runs, "all", key) for key in ("start", "peak", "end")]
        parts = [
            ", ".join(_cell(runs, part, key) for key in ("start", "peak", "end"))
            for part in ("label_right", "label_wrong")
        ]
        peak = f"{cells[1]} ({steps})"
        rises = f"rose in {rose} of {len(runs)}"
        shown = (row["label"], str(len(runs)), cells[0], peak, cells[2], *parts, rises, counted)
        lines.append("| " + " | ".join(shown) + " |")
    note = "Means over seeds ± half of Student's 95 % interval; the peak's step is chosen per run.\n"
    return "\n".join(lines) + "\n\n" + note


def _cell(runs: Sequence[dict[str, Any]], part: str, key: str) -> str:
    values = [run[part][key] for run in runs if run[part] is not None]
    if not values:
        return "-"
    found = mean_interval(values)
    return f"{values[0]:.3f}" if found is None else f"{found[0]:.3f} ± {found[2] - found[0]:.3f}"
