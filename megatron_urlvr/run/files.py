"""A run's folder as the training loop uses it: rank 0 writes, every rank hears what it needs."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..config.loader import load_config
from ..config.root import Config
from ..data.labels import total_uses
from ..distributed.exchange import gather_from_leaders
from ..distributed.layout import Layout, broadcast_json
from ..exit_codes import ExitCode, UnusableInput
from ..monitor.writers import Writers, build_writers
from ..policy import checkpoint
from ..policy.policy import Policy
from ..rollout.ledger import Ledger
from ..rollout.records import group_to_record, write_records
from ..types import Group
from .branching import branch
from .changes import HORIZON, differences
from .folder import RunDir, State, write_json, write_text
from .step_lines import StepLines

MODEL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.safetensors")


class RunFiles:
    """Everything a run writes, and what it finds there when it starts again."""

    def __init__(self, config: Config, layout: Layout, folder: RunDir) -> None:
        self.config, self.layout, self.folder = config, layout, folder
        self.writers = Writers([])
        self.finished: int | None = None
        """The folder holds this very run, and it has come to its end, with this exit code."""
        self._changed: list[str] = []
        """On the first rank, settings that the run began with otherwise, as `key: old -> new`."""
        self.ledger: Ledger | None = None
        """On replica leaders, where finished groups cost too much to be generated again."""
        if config.rollout.engine == "sglang" and layout.is_leader:
            self.ledger = Ledger(folder.ledger, layout.dp_rank)
        self._began = False
        """status.json says `running`, or how this very process or another rank ended."""
        self._saved: int | None = None
        """Step of the newest checkpoint that this process wrote or restored."""
        self._saving: checkpoint.Saving | None = None
        """What is being written in the background."""

    @classmethod
    @contextmanager
    def opened(cls, config: Config, layout: Layout) -> Iterator[RunFiles]:
        """Hold the folder for this run. UnusableInput, on every rank, when it cannot be used."""
        files = cls(config, layout, RunDir(config.run.dir))
        with ExitStack() as stack:
            problem, finished = "", None
            if layout.is_main:
                try:
                    stack.enter_context(files.folder.lock())
                    own = checkpoint.list_checkpoints(files.folder.checkpoints)
                    branch(config, files.folder, checkpoints=own)
                    finished = files._finished_with()
                except UnusableInput as error:
                    problem = str(error)
            problem, files.finished = files._from_main([problem, finished])
            if problem:
                raise UnusableInput(problem)
            stack.callback(files._close_writers)
            stack.callback(files._abandon)
            yield files

    def _from_main(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.layout.world_size == 1:
            return value
        return broadcast_json(value, source=0, group=self.layout.control)

    def _finished_with(self) -> int | None:
        """The exit code when there is nothing left to do, else None. UnusableInput when the folder holds what this run
        would overwrite."""
        folder, steps = self.folder, self.config.run.steps
        has_checkpoints = bool(checkpoint.list_checkpoints(folder.checkpoints))
        if not has_checkpoints and not StepLines(folder.metrics).rows() and not Ledger(folder.ledger, 0).steps():
            return None
        if not folder.config.exists():
            raise UnusableInput(
                f"run.dir = {folder.path} holds metrics or checkpoints, but no config.yaml that says of which run;"
                " choose another run.dir, or remove the folder to start over"
            )
        before = load_config(folder.config)
        refused, self._changed = differences(before, self.config)
        if refused:
            raise UnusableInput(
                f"run.dir = {folder.path} holds a run with other settings ({'; '.join(refused)}); choose"
                f" another run.dir, or remove the folder to start over{_keeping_the_schedule(before, refused)}"
            )
        if self.config.run.resume == "never":
            raise UnusableInput(
                f"run.resume = never, but run.dir = {folder.path} holds a run already; choose another run.dir, or"
                " resume=auto to continue"
            )
        status = folder.read_status()
        if status is not None and status.state == "stopped" and self.config.monitor.collapse.action != "warn":
            print(f"{folder.path} was stopped: {status.reason}; monitor.collapse.action=warn goes on", flush=True)
            return int(ExitCode.STOPPED)
        if status is None or status.state != "done" or status.step < steps:
            return None
        print(f"{folder.path} is done: {status.step} steps; raise run.steps to go on", flush=True)
        return int(ExitCode.DONE)

    # -- start --------------------------------------------------------------------------------------------------------

    def begin(self, fingerprints: Mapping[str, str], policy: Policy) -> dict[str, Any] | None:
        """Restore the newest intact checkpoint into `policy`; returns the trainer's state, None at the beginning.

        Rows of metrics after the restored step are dropped: those steps are taken again. UnusableInput, on every rank,
        when no checkpoint is intact, or when data or model (`fingerprints`: their hashes) are not what the run began
        with.
        """
        path, damaged = checkpoint.newest_intact(policy, self.folder.checkpoints)
        if path is None and damaged:
            raise UnusableInput(
                f"{' '.join(p + '.' for p in damaged)} No intact checkpoint is left in {self.folder.checkpoints};"
                " move the folder away to start over"
            )
        hashes = dict(fingerprints) | {"model": _hash_model(Path(self.config.model.path))}
        if problem := self._from_main(_changed_inputs(self.folder, hashes) if self._goes_on(path) else ""):
            raise UnusableInput(problem)
        state = None if path is None else checkpoint.load(policy, path)
        self._saved = None if state is None else int(state["step"])
        if self.layout.is_main:
            self._write_start(path, damaged, hashes)
        self._began = True
        return state

    def _goes_on(self, path: Path | None) -> bool:
        """On the first rank, whether something of an earlier launch is used."""
        return self.layout.is_main and (path is not None or bool(Ledger(self.folder.ledger, 0).steps()))

    def _write_start(self, path: Path | None, damaged: Sequence[str], hashes: Mapping[str, str]) -> None:
        """Cut the folder back to the checkpoint at `path` (None: to nothing), from where the run goes on."""
        folder, step = self.folder, -1 if self._saved is None else self._saved
        for problem in damaged:
            print(f"{problem}; continuing from {path}", file=sys.stderr, flush=True)
        self._set_aside_after(step, "damaged")
        dropped = StepLines(folder.metrics).truncate(step)
        for name in self.config.eval.sets:
            StepLines(folder.evaluations(name)).truncate(step)
        for sampled in folder.samples_from(step + 1):
            sampled.unlink()
        if self.ledger is None:  # what servers finished earlier has no place in what is sampled here from now on
            shutil.rmtree(folder.ledger, ignore_errors=True)
        if path is not None:
            print(f"resumed after step {step} from {path} ({dropped} later rows of metrics dropped)", flush=True)
        if self._changed:
            print(f"it goes on with other settings: {'; '.join(self._changed)}", flush=True)
        folder.clear_done()
        folder.write_config(self.config)
        folder.write_provenance(hashes, self._changed)
        folder.write_status("running", max(step, 0))
        self.writers = build_writers(
            folder.path, self.config.monitor, config=self.config.model_dump(mode="json"), console=True
        )

    def _set_aside_after(self, step: int, why: str) -> None:
        """Rename newer checkpoints, out of the way of those to be written in their place, and of the newest k."""
        for newer, path in checkpoint.list_checkpoints(self.folder.checkpoints):
            if newer > step:
                aside = path.with_name(f"{why}_{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)

    # -- while it runs ------------------------------------------------------------------------------------------------

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One row of metrics, to every writer; and the state of the run."""
        self.writers.log(step, metrics)
        if self.layout.is_main:
            self.folder.write_status("running", step)

    def record(self, step: int, groups: Sequence[Group]) -> Path:
        """Keep a step's rollouts, of all replicas; returns where."""
        path = self.folder.rollouts(step)
        parts = gather_from_leaders([group_to_record(group) for group in groups], self.layout)
        if self.layout.is_main:
            write_records(path, [record for part in parts for record in part])
        return path

    def append_evaluation(self, name: str, row: Mapping[str, Any]) -> None:
        """Per-problem results of one evaluation of a set."""
        if self.layout.is_main:
            StepLines(self.folder.evaluations(name)).append(row)

    def write_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Samples of the probe prompts."""
        path = self.folder.samples(step)
        if self.layout.is_main and rows:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, "".join(json.dumps(row) + "\n" for row in rows))

    def save(self, policy: Policy, state: Mapping[str, Any], *, wait: bool = True) -> None:
        """A checkpoint after `state["step"]`, unless it is there already. CheckpointError when it, or one that was
        still being written, cannot be written. Without `wait` it is there once `commit` finds it complete.

        `state["labels"]`, this replica's uses of labels, is kept for each replica.
        """
        self.commit()
        step = int(state["step"])
        if self._saved == step:
            return
        trainer = {**state, "labels": gather_from_leaders(state["labels"], self.layout)}
        folder, keep = self.folder.checkpoints, self.config.checkpoint.keep
        if wait:
            checkpoint.save(policy, folder, step, trainer, keep=keep)
            self._has_saved(step)
        else:
            self._saving = checkpoint.Saving(policy, folder, step, trainer, keep=keep)

    def commit(self, *, wait: bool = True) -> None:
        """Make a checkpoint of what is being written in the background, if anything is: now, or without `wait` only
        when all ranks have written it. CheckpointError when one of them could not."""
        if self._saving is None or not (wait or self._saving.written()):
            return
        saving, self._saving = self._saving, None
        saving.finish()
        self._has_saved(saving.step)

    def _has_saved(self, step: int) -> None:
        self._saved = step
        if self.ledger is not None:  # the oldest checkpoint may be the one to go on from
            self.ledger.forget(checkpoint.list_checkpoints(self.folder.checkpoints)[-1][0])

    def set_aside_after(self, step: int) -> None:
        """Rename the checkpoints after `step` to `collapsed_...`: the run was rolled back to it."""
        self.commit()
        if self.layout.is_main:
            self._set_aside_after(step, "collapsed")
        self._saved = None

    # -- the end ------------------------------------------------------------------------------------------------------

    def write_labels(self, supervised: bool, uses: Mapping[str, int]) -> None:
        """Every use of labels, over all replicas."""
        total = total_uses(gather_from_leaders(dict(uses), self.layout))
        if self.layout.is_main:
            write_json(self.folder.labels, {"supervised": supervised, "uses": dict(sorted(total.items()))})

    def end(self, state: State, step: int, *, exit_code: int, reason: str) -> None:
        """Say how the run ended. Of failures every rank may tell, and the first is heard: the others fail for it."""
        self._close_writers()
        status = self.folder.read_status()
        told = self._began and status is not None and status.state == "failed"
        if told or not (self.layout.is_main or state == "failed"):
            return
        if state == "done":
            self.folder.mark_done()
        self.folder.write_status(state, step, exit_code=exit_code, reason=reason)

    def _abandon(self) -> None:
        """Give up what is still being written in the background: the run has come to an end that ranks do not share."""
        if self._saving is not None:
            self._saving.abandon()

    def _close_writers(self) -> None:
        try:
            self.writers.close()
        except OSError as error:  # each row was flushed when it was logged; this must not hide how the run ended
            print(f"closing the metrics of {self.folder.path}: {error}", file=sys.stderr, flush=True)


def _keeping_the_schedule(before: Config, refused: Sequence[str]) -> str:
    """What else is to be said where the schedule's horizon is all that is `refused`."""
    kept = before.optim.horizon(before.run.steps)
    if kept is None or [change.partition(":")[0] for change in refused] != [HORIZON]:
        return ""
    return (
        f". The schedule {before.optim.schedule} began with a horizon of {kept} steps: {HORIZON}={kept} keeps it, and"
        " steps after it are taken at optim.min_lr"
    )


def _changed_inputs(folder: RunDir, hashes: Mapping[str, str]) -> str:
    """A sentence when data or model differ from what the run began with."""
    before = folder.read_provenance().get("hashes", {})
    changed = sorted(name for name in hashes if before.get(name, hashes[name]) != hashes[name])
    if not changed:
        return ""
    return (
        f"run.dir = {folder.path} holds a run that began with other contents of {', '.join(changed)}, under the same"
        " settings; put them back, or choose another run.dir"
    )


def _hash_model(folder: Path) -> str:
    """SHA-256 over names, sizes and (for small files) contents of a model folder."""
    digest = hashlib.sha256()
    for file in sorted(path for pattern in MODEL_FILES for path in folder.glob(pattern)):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        if file.stat().st_size <= 64 << 20:
            digest.update(file.read_bytes())
    return digest.hexdigest()
