"""A run folder, read: its curves, their start, peak and end, a verdict in words, its samples and its use of labels."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .curves import Curve, FloatArray, Summary, ends, mean_curve, summarize
from .reading import RunError, read_metrics, read_object, read_objects, read_settings


@dataclass
class RunRecord:
    """What a run folder says about itself. Files that are not there yet leave their part empty."""

    path: Path
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    """Lines of metrics.jsonl in step order; of a step written twice, the later one."""
    status: dict[str, Any] = field(default_factory=dict)
    labels: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    """Name in figures and tables."""

    @property
    def name(self) -> str:
        return str(self.config["run"]["name"])

    @property
    def seed(self) -> int | None:
        return self.config["run"].get("seed")

    @property
    def base_path(self) -> Path:
        """Folder of the policy it started from."""
        return Path(str(self.config.get("model", {}).get("path", "unknown")))

    @property
    def base(self) -> str:
        """Name of the policy it started from: the last part of `model.path`."""
        return self.base_path.name

    @property
    def supervised(self) -> bool | None:
        """Whether a reward read labels; None when the run does not say."""
        return self.labels.get("supervised")

    @property
    def metrics(self) -> list[str]:
        """Names of all metrics that were logged with a value, in alphabetical order."""
        return sorted({name for row in self.rows for name, value in row.items() if value is not None} - {"step"})

    def curve(self, metric: str) -> Curve:
        """`metric` over the steps that have it; an empty curve if none has."""
        found = [(row["step"], row[metric]) for row in self.rows if row.get(metric) is not None]
        steps, values = zip(*found, strict=True) if found else ((), ())
        return Curve(np.asarray(steps, dtype=np.int64), np.asarray(values, dtype=np.float64))

    def first(self, metric: str) -> float | None:
        """The first value of `metric`, None if there is none."""
        return next((float(row[metric]) for row in self.rows if row.get(metric) is not None), None)

    @property
    def eval_sets(self) -> list[str]:
        """Held-out sets that were measured, in the config's order."""
        measured = {match[1] for name in self.metrics if (match := re.match(r"eval/([^/]+)/avg@\d+$", name))}
        ordered = [name for name in self.config.get("eval", {}).get("sets", {}) if name in measured]
        return ordered + sorted(measured - set(ordered))

    def accuracy_metric(self, eval_set: str) -> str | None:
        """Name of the set's sampled accuracy, `eval/<set>/avg@<n>`; None if it was not measured."""
        pattern = re.compile(rf"eval/{re.escape(eval_set)}/avg@\d+")
        return next((name for name in self.metrics if pattern.fullmatch(name)), None)

    def accuracy(self, eval_set: str) -> tuple[Curve, FloatArray | None]:
        """The set's accuracy and its standard errors, `[T]` each (None when they were not logged at every step)."""
        metric = self.accuracy_metric(eval_set)
        if metric is None:
            return self.curve(""), None
        curve, errors = self.curve(metric), self.curve(metric + "_se")
        return curve, errors.values if np.array_equal(curve.steps, errors.steps) else None

    def summary(self, eval_set: str) -> Summary | None:
        """Start, peak, end and verdict on the set; None if it was not measured."""
        curve, errors = self.accuracy(eval_set)
        return summarize(curve, errors) if len(curve) else None

    def base_lines(self, eval_set: str) -> dict[str, float]:
        """What the untrained base scores on the set, by name: `greedy`, `maj@16`, `avg@16`."""
        prefix = f"eval/{eval_set}/base/"
        found = {name.removeprefix(prefix): self.first(name) for name in self.metrics if name.startswith(prefix)}
        return {name: value for name, value in found.items() if value is not None and not name.endswith("_se")}

    def ends_of(self, metric: str) -> tuple[float, float] | None:
        """Mean of the first and of the last few values of `metric`; None if it was not logged."""
        curve = self.curve(metric)
        return ends(curve) if len(curve) else None

    @property
    def sample_steps(self) -> list[int]:
        """Steps whose probe samples were kept."""
        return sorted(int(match[1]) for file in self._sample_files() if (match := _SAMPLES.fullmatch(file.name)))

    def samples(self, step: int) -> list[dict[str, Any]]:
        """Probe samples of `step`: objects with prompt, response, answer, reward, correct. RunError for others."""
        path = self.path / "samples" / f"step_{step:06d}.jsonl"
        rows = read_objects(path)
        for number, row in enumerate(rows, start=1):
            if missing := [key for key in ("prompt", "response") if not isinstance(row.get(key), str)]:
                raise RunError(f"{path}, sample {number} has no {missing[0]}")
        return rows

    def _sample_files(self) -> Iterable[Path]:
        folder = self.path / "samples"
        return folder.iterdir() if folder.is_dir() else ()

    @property
    def state(self) -> str:
        """`done`, or what else status.json says, with the step and the reason of an unfinished run."""
        state = str(self.status.get("state", "unknown"))
        if state == "done":
            return state
        step, steps = self.status.get("step"), self.config["run"].get("steps")
        where = f" at step {step} of {steps}" if step is not None else ""
        reason = f": {self.status['reason']}" if self.status.get("reason") else ""
        return f"{state}{where}{reason}"


_SAMPLES = re.compile(r"step_(\d+)\.jsonl")


@dataclass
class Series:
    """Runs that make one line of a figure: one run, or the replicates of one setting over seeds."""

    label: str
    runs: list[RunRecord]
    base: str = ""
    """Name of the policy the runs start from; empty: the last part of `model.path`."""
    within_base: str = ""
    """Name beside other series of the same base, in a study that varies both; empty: the label."""

    def __post_init__(self) -> None:
        self.base = self.base or self.runs[0].base

    @property
    def reward(self) -> str:
        """The reward in one line."""
        return reward_text(self.runs[0].config)

    @property
    def supervised(self) -> bool:
        """Whether a reward of any of the runs read labels."""
        return any(bool(run.supervised) for run in self.runs)

    def curves(self, metric: str) -> list[Curve]:
        """`metric` of each run that logged it."""
        return [curve for run in self.runs if len(curve := run.curve(metric))]

    def mean(self, metric: str) -> Curve:
        """Mean of `metric` over the runs that logged it; empty if none did."""
        curves = self.curves(metric)
        return mean_curve(curves) if curves else self.runs[0].curve(metric)

    def accuracy_metric(self, eval_set: str) -> str | None:
        """Name of the sampled accuracy on `eval_set`, from the first run that measured it."""
        return next((name for run in self.runs if (name := run.accuracy_metric(eval_set))), None)


def load_run(path: Path, label: str | None = None) -> RunRecord:
    """Read a run folder. RunError when its config.yaml is none of a run, or its metrics.jsonl is broken inside."""
    config = read_settings(path / "config.yaml")
    if problem := _not_a_run(config):
        raise RunError(f"{path / 'config.yaml'} is no config of a run: {problem}")
    rows = {row["step"]: row for row in read_metrics(path / "metrics.jsonl")}
    record = RunRecord(
        path=path,
        config=config,
        rows=[rows[step] for step in sorted(rows)],
        status=read_object(path / "status.json"),
        labels=_read_labels(path / "labels.json"),
    )
    record.label = record.name if label is None else label
    return record


def _read_labels(path: Path) -> dict[str, Any]:
    """What a run says of its use of labels; empty when it does not. RunError for what counts no uses."""
    found = read_object(path)
    uses = found.get("uses", {})
    if not isinstance(uses, dict) or not all(isinstance(count, int | float) for count in uses.values()):
        raise RunError(f"{path}: uses = {uses!r} counts no uses of labels")
    return found


def _not_a_run(config: Mapping[str, Any]) -> str:
    """Which of the settings that are read here is not what a run's is; empty when all are. Sections may be absent."""
    if not isinstance(config.get("run"), dict) or "name" not in config["run"]:
        return "it has no run.name"
    for key in ("model", "eval", "eval.sets", "reward", "reward.terms"):
        section: Any = config
        for part in key.split("."):
            section = section.get(part, {})
        if not isinstance(section, dict):
            return f"{key} = {section!r} is no section"
    for label, term in config.get("reward", {}).get("terms", {}).items():
        weighed = isinstance(term, dict) and isinstance(term.get("weight", 1.0), int | float)
        if not weighed or "name" not in term:
            return f"reward.terms.{label} = {term!r} is no term"
    return ""


def tell_bases_apart(series: Iterable[Series]) -> None:
    """Give bases that share a name but not a folder longer names: the last two parts of their path."""
    folders: dict[str, set[Path]] = {}
    series = list(series)
    for item in series:
        folders.setdefault(item.base, set()).add(item.runs[0].base_path)
    for item in series:
        if len(folders[item.base]) > 1:
            item.base = "/".join(item.runs[0].base_path.parts[-2:])


def reward_text(config: Mapping[str, Any]) -> str:
    """The reward of a run config in one line: `trajectory_entropy (sum)`, `majority_vote + 0.1 length`."""
    terms = []
    for term in config.get("reward", {}).get("terms", {}).values():
        weight = float(term.get("weight", 1.0))
        text = str(term["name"]) + (f" ({term['aggregation']})" if term.get("aggregation") else "")
        terms.append(text if weight == 1 else f"{weight:g} {text}")
    return " + ".join(terms) or "unknown"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of a nested mapping: `{"optim": {"lr": 1}}` -> `{"optim.lr": 1}`."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def differing_settings(records: Iterable[RunRecord]) -> dict[str, list[Any]]:
    """Settings whose value is not the same in every run, one value a run (None where a run has no such setting).

    Name and folder always differ and are left out.
    """
    configs = [flatten(record.config) for record in records]
    keys = dict.fromkeys(key for config in configs for key in config if key not in ("run.name", "run.dir"))
    columns = {key: [config.get(key) for config in configs] for key in keys}
    return {key: values for key, values in columns.items() if any(value != values[0] for value in values)}
