"""`urlvr study`: base policies and training runs from one file, a few at a time, and one report on all of them.

    bases (pretrain, cached) ─► runs (train, resumable) ─► report

What is done is not done again: a study that was interrupted, or whose file got another run, is simply run again.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_urlvr.config.errors import did_you_mean
from megatron_urlvr.config.loader import load_config, to_yaml
from megatron_urlvr.config.pretrain import PretrainConfig
from megatron_urlvr.config.root import Config
from megatron_urlvr.config.study import StudyConfig, StudyRun
from megatron_urlvr.exit_codes import DISK_FULL, ExitCode, UnusableInput
from megatron_urlvr.run.folder import RunDir, write_text

from .progress import job_watcher
from .report import REPORT_FILE, write_series_report
from .runs import Series, load_run
from .scheduler import Job, Outcome, Scheduler
from .summary import write_summary

CLI = (sys.executable, "-m", "megatron_urlvr.cli")
"""The command that pretrains and trains."""


@dataclass(frozen=True)
class PlannedBase:
    """One pretraining: a base of the study under one seed."""

    job: str
    config: PretrainConfig
    arguments: tuple[str, ...]
    folder: Path
    """Holds `<snapshot>/` once it is done."""


@dataclass(frozen=True)
class PlannedRun:
    """One training run: a run of the study under one seed."""

    key: str
    """`<run>` or `<run>/seed<k>`: its folder below `runs/`."""
    run: str
    config: Config
    arguments: tuple[str, ...]
    base: PlannedBase | None
    snapshot: str

    @property
    def folder(self) -> Path:
        return Path(self.config.run.dir)


@dataclass(frozen=True)
class Plan:
    """Everything that a study runs."""

    bases: list[PlannedBase]
    runs: list[PlannedRun]


def run_study(config: StudyConfig, path: Path, jobs: int | None = None, *, cli: Sequence[str] = CLI) -> int:
    """Run what is not done yet of the study in the file `path`, then report on it. Returns the exit code: 0, 1 when
    runs failed, 75 when a signal ended it early. Raises UnusableInput before anything is started."""
    plan = plan_study(config, path)
    folder = Path(config.dir)
    _keep(config, folder)
    waiting = [run for run in plan.runs if not is_done(run)]
    if skipped := len(plan.runs) - len(waiting):
        print(f"{skipped} of {len(plan.runs)} runs are done already", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with job_watcher() as watcher:
        queue = study_jobs(plan.bases, waiting, folder / "logs", cli)
        limit = None if config.hours is None else config.hours * 3600
        slots = jobs or config.jobs
        scheduler = Scheduler(queue, slots=slots, environment=environment, watcher=watcher, limit_s=limit)
        outcomes = scheduler.run()
    if scheduler.interrupted:
        if not scheduler.signalled:  # its hours are over: what there is can be looked at
            _report(config, plan, {})
        print(f"interrupted; the same command continues: urlvr study {path}", flush=True)
        return int(ExitCode.PREEMPTED)
    failed = {name: outcome for name, outcome in outcomes.items() if outcome.state != "done"}
    _report(config, plan, failed)
    for name, outcome in failed.items():
        log = f"; log: {scheduler.jobs[name].log}" if outcome.exit_code is not None else ""
        print(f"{name} {outcome.state}: {outcome.reason}{log}", file=sys.stderr)
    return int(ExitCode.FAILED if failed else ExitCode.DONE)


def report_study(config: StudyConfig, path: Path) -> None:
    """Report on the runs that are there, however they were started. UnusableInput when there is none."""
    plan = plan_study(config, path)
    if not any(RunDir(run.folder).config.exists() for run in plan.runs):
        raise UnusableInput(f"dir = {config.dir}: none of the study's runs is there yet to report on.")
    _report(config, plan, {})


def commands_of(config: StudyConfig, path: Path) -> list[str]:
    """What `run_study` would start, bases first, as commands for a shell: for runs that a cluster is to make."""
    plan = plan_study(config, path)
    waiting = [run for run in plan.runs if not is_done(run)]
    jobs = study_jobs(plan.bases, waiting, Path(config.dir) / "logs", ("urlvr",))
    return [shlex.join(job.command) for job in jobs]


# -- the plan ---------------------------------------------------------------------------------------------------------


def plan_study(config: StudyConfig, path: Path) -> Plan:
    """Load every config of the study. UnusableInput lists what is wrong with any of them."""
    plan, problems = Plan([], []), list[str]()
    runs = config.all_runs()
    seeds_of = {name: _seeds(config, run) for name, run in runs.items()}
    for seed in dict.fromkeys(seed for seeds in seeds_of.values() for seed in seeds):
        bases: dict[str, PlannedBase] = {}
        for name in config.bases:
            try:
                bases[name] = _plan_base(config, path, name, seed)
            except UnusableInput as error:
                problems.append(str(error))
        for name, run in runs.items():
            base, _, snapshot = (run.base or "").partition("/")
            if seed not in seeds_of[name]:
                continue
            if run.base is not None and base not in bases:
                continue  # its base's config is at fault, which is told already
            try:
                plan.runs.append(_plan_run(config, path, name, run, seed, bases.get(base), snapshot))
            except UnusableInput as error:
                problems.append(str(error))
        plan.bases.extend(bases.values())
    if problems:
        raise UnusableInput("\n".join(dict.fromkeys(problems)))
    order = {name: place for place, name in enumerate(runs)}
    plan.runs.sort(key=lambda run: order[run.run])
    return plan


def _seeds(config: StudyConfig, run: StudyRun) -> list[int | None]:
    return [*(run.seeds or config.seeds)] or [None]


def _plan_base(config: StudyConfig, path: Path, name: str, seed: int | None) -> PlannedBase:
    from megatron_urlvr.pretrain import base_dir  # late: it brings the policy's libraries along

    spec = config.bases[name]
    overrides = [*spec.overrides, *_settings({"run.seed": seed})]
    file = path.parent / spec.config
    loaded = load_config(file, overrides, PretrainConfig)
    return PlannedBase(f"pretrain/{_key(name, seed)}", loaded, (str(file), *overrides), base_dir(loaded))


def _plan_run(
    config: StudyConfig,
    path: Path,
    name: str,
    run: StudyRun,
    seed: int | None,
    base: PlannedBase | None,
    snapshot: str,
) -> PlannedRun:
    key = _key(name, seed)
    _check_snapshot(name, run, base, snapshot)
    overrides = [
        *run.overrides,
        *_settings(
            {
                "run.name": key.replace("/", "-"),
                "run.dir": str(Path(config.dir) / "runs" / key),
                "run.seed": seed,
                "model.path": str(base.folder / snapshot) if base is not None else None,
            }
        ),
    ]
    file = path.parent / run.config
    loaded = load_config(file, overrides)
    for eval_set in filter(None, (config.select_set, config.measure_set)):
        if eval_set not in loaded.eval.sets or loaded.eval.every == 0:
            raise UnusableInput(
                f"runs.{name}: peaks are to be chosen on {config.select_set!r} and measured on {config.measure_set!r},"
                f" but {file} does not evaluate {eval_set!r}; its sets: {', '.join(loaded.eval.sets) or 'none'}"
            )
    return PlannedRun(key, name, loaded, (str(file), *overrides), base, snapshot)


def _check_snapshot(name: str, run: StudyRun, base: PlannedBase | None, snapshot: str) -> None:
    if base is not None and snapshot not in base.config.snapshots:
        known = base.config.snapshots
        raise UnusableInput(
            f"runs.{name}.base = {run.base!r}: its pretraining config has no snapshot {snapshot!r}."
            f"{did_you_mean(snapshot, known)} Known: {', '.join(known)}."
        )


def _settings(values: Mapping[str, str | int | None]) -> list[str]:
    """Overrides for the values that are there; text is quoted, so that YAML reads it as text."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items() if value is not None]


def _key(name: str, seed: int | None) -> str:
    return name if seed is None else f"{name}/seed{seed}"


def is_done(run: PlannedRun) -> bool:
    """Whether the run has come to its end under these very settings. One that has other settings is left to `train`,
    which knows which of them a run may change, and refuses the others."""
    folder = RunDir(run.folder)
    status = folder.read_status()
    if not folder.done.exists() and (status is None or status.state != "stopped"):
        return False
    try:
        return load_config(run.folder) == run.config
    except UnusableInput:
        return False


# -- jobs -------------------------------------------------------------------------------------------------------------


def study_jobs(
    bases: Sequence[PlannedBase], runs: Sequence[PlannedRun], logs: Path, cli: Sequence[str] = CLI
) -> list[Job]:
    """A job for each run, and before them one for each base that a run needs; two bases that are the same are made
    once."""
    makers: dict[Path, str] = {}
    jobs = []
    needed = {run.base.job for run in runs if run.base is not None}
    for base in bases:
        if base.job in needed and base.folder not in makers:
            makers[base.folder] = base.job
            log = logs / "pretrain" / f"{base.job.removeprefix('pretrain/').replace('/', '-')}.log"
            jobs.append(Job(base.job, (*cli, "pretrain", *base.arguments), log))
    for run in runs:
        jobs.append(
            Job(
                run.key,
                (*cli, "train", *run.arguments),
                logs / f"{run.key.replace('/', '-')}.log",
                after=(makers[run.base.folder],) if run.base is not None else (),
                obstacle=_MissingSnapshot(run),
                steps=run.config.run.steps,
                metrics=RunDir(run.folder).metrics,
            )
        )
    return jobs


@dataclass(frozen=True)
class _MissingSnapshot:
    """Says that pretraining ended without the snapshot that a run starts from."""

    run: PlannedRun

    def __call__(self) -> str | None:
        base = self.run.base
        if base is None or (base.folder / self.run.snapshot).is_dir():
            return None
        return (
            f"{base.job} ended without the snapshot {self.run.snapshot}: {base.folder / self.run.snapshot} is not there"
        )


# -- the report -------------------------------------------------------------------------------------------------------


def study_series(config: StudyConfig, plan: Plan) -> list[Series]:
    """One series a run of the study, with its replicates; runs that never began are left out."""
    out, within = [], config.labels_within_base()
    for name, spec in config.all_runs().items():
        began = [run for run in plan.runs if run.run == name and RunDir(run.folder).config.exists()]
        if began:
            records = [load_run(run.folder) for run in began]
            label = spec.label or name
            out.append(Series(label, records, base=_base_name(config, spec), within_base=within.get(name, "")))
    return out


def _base_name(config: StudyConfig, spec: StudyRun) -> str:
    """The snapshot's name, with its base's where another base has a snapshot of that name; empty without a base."""
    if spec.base is None:
        return ""
    snapshot = spec.base.partition("/")[2]
    clash = any(
        other.base != spec.base and (other.base or "").endswith("/" + snapshot) for other in config.all_runs().values()
    )
    return spec.base if clash else snapshot


def _report(config: StudyConfig, plan: Plan, failed: Mapping[str, Outcome]) -> None:
    """Write the report on every run that began, and say where everything is."""
    folder = Path(config.dir)
    series = study_series(config, plan)
    if not series:
        return
    notes = [*config.notes, *(f"{name} {outcome.state}: {outcome.reason}." for name, outcome in failed.items())]
    page = write_series_report(
        series,
        folder / "report" / REPORT_FILE,
        title=config.title,
        notes=notes,
        select_set=config.select_set,
        measure_set=config.measure_set,
    )
    summary = write_summary(series, page.parent, measure=config.measure_set, select=config.select_set)
    overview = page.parent / "overview.png"
    print(f"report       {page}")
    if summary is not None:
        print(f"summary      {summary}")
    if overview.exists():
        print(f"figure       {overview}")
    print(f"runs         urlvr runs {folder / 'runs'}")
    print(f"checkpoints  {folder / 'runs'}/<run>/checkpoints")
    print(f"TensorBoard  tensorboard --logdir {folder / 'runs'}", flush=True)


def _keep(config: StudyConfig, folder: Path) -> None:
    """Make the study's folder, with the resolved study in it. UnusableInput where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "study.yaml", to_yaml(config))
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise UnusableInput(f"dir = {str(folder)!r} cannot be written: {error.strerror}.") from error
