"""A run's folder as the training loop uses it: rank 0 writes, every rank hears what it needs."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from .config.loader import to_yaml
from .config.root import Config
from .exchange import gather_from_leaders
from .exit_codes import UnusableInput
from .layout import Layout, broadcast_json
from .monitor.writers import Writers, build_writers
from .policy import checkpoint
from .policy.policy import Policy
from .provenance import provenance
from .rollout.records import group_to_record, write_records
from .run_dir import RunDir, State, write_json, write_text
from .types import Group

CHANGEABLE = ("run.steps", "run.resume", "run.threads", "run.name", "run.dir", "monitor.", "checkpoint.")
"""Settings that may differ between a run and its continuation."""


class RunFiles:
    """Everything a run writes, and what it finds there when it starts again."""

    def __init__(self, config: Config, layout: Layout, folder: RunDir) -> None:
        self.config, self.layout, self.folder = config, layout, folder
        self.writers = Writers([])

    @classmethod
    @contextmanager
    def opened(cls, config: Config, layout: Layout) -> Iterator[RunFiles]:
        """Hold the folder for this run. UnusableInput, on every rank, when it cannot be used."""
        folder = RunDir(config.run.dir)
        files = cls(config, layout, folder)
        if not layout.is_main:
            files._hear("")
            yield files
            return
        try:
            with folder.lock():
                files._refuse_another_run()
                files._hear("")
                try:
                    yield files
                finally:
                    files.writers.close()
        except UnusableInput as error:
            if not files._heard:
                files._hear(str(error))
            raise

    _heard = False

    def _hear(self, problem: str) -> None:
        """Rank 0 tells the others whether the folder may be used."""
        self._heard = True
        if self.layout.world_size > 1:
            problem = broadcast_json(problem, source=0, group=self.layout.control)
        if problem and not self.layout.is_main:
            raise UnusableInput(problem)

    def _refuse_another_run(self) -> None:
        text = to_yaml(self.config)
        if self.folder.config.exists():
            changed = _differences(self.folder.config, self.config)
            if changed:
                raise UnusableInput(
                    f"run.dir = {self.folder.path} holds a run with other settings ({'; '.join(changed)}); choose"
                    " another run.dir, or remove the folder to start over"
                )
            if self.config.run.resume == "never" and checkpoint.list_checkpoints(self.folder.checkpoints):
                raise UnusableInput(
                    f"run.resume = never, but {self.folder.checkpoints} holds checkpoints; choose another run.dir, or"
                    " resume=auto to continue"
                )
        write_text(self.folder.config, text)

    # -- start --------------------------------------------------------------------------------------------------------

    def begin(self, fingerprints: Mapping[str, str], policy: Policy) -> dict[str, Any] | None:
        """Restore the newest intact checkpoint into `policy`; returns the trainer's state, None at the beginning.

        Rows of metrics after the restored step are dropped: those steps are taken again.
        """
        path, problems = checkpoint.newest_intact(policy, self.folder.checkpoints)
        if path is None and problems:
            raise UnusableInput(
                f"{' '.join(p + '.' for p in problems)} No intact checkpoint is left in {self.folder.checkpoints};"
                " move the folder away to start over"
            )
        state = None if path is None else checkpoint.load(policy, path)
        step = -1 if state is None else int(state["step"])
        if self.layout.is_main:
            for problem in problems:
                print(f"{problem}; continuing from {path}", file=sys.stderr, flush=True)
            dropped = self.folder.truncate_metrics(step)
            self._truncate_evaluations(step)
            if path is not None:
                print(f"resumed after step {step} from {path} ({dropped} later rows of metrics dropped)", flush=True)
            self.folder.clear_done()
            model = {"model": _hash_folder(Path(self.config.model.path))}
            write_json(self.folder.provenance, provenance({**fingerprints, **model}))
            self.folder.write_status("running", max(step, 0))
            self.writers = build_writers(
                self.folder.path, self.config.monitor, config=self.config.model_dump(mode="json"), console=True
            )
        return state

    def _truncate_evaluations(self, step: int) -> None:
        for file in (self.folder.path / "evals").glob("*.jsonl"):
            RunDirLines(file).truncate(step)

    # -- while it runs ------------------------------------------------------------------------------------------------

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One row of metrics, to every writer; and the state of the run."""
        self.writers.log(step, metrics)
        if self.layout.is_main:
            self.folder.write_status("running", step)

    def record(self, step: int, groups: Sequence[Group]) -> None:
        """Keep a step's rollouts, of all replicas, when the config asks for it."""
        if self.config.rollout.record or self.config.run.rollout_only:
            self.keep(self.folder.rollouts(step), groups)

    def keep(self, path: Path, groups: Sequence[Group]) -> None:
        """Write the groups of all replicas to `path`."""
        parts = gather_from_leaders([group_to_record(group) for group in groups], self.layout)
        if self.layout.is_main:
            write_records(path, [record for part in parts for record in part])

    def append_evaluation(self, name: str, row: Mapping[str, Any]) -> None:
        """Per-problem results of one evaluation of a set."""
        if self.layout.is_main:
            RunDirLines(self.folder.path / "evals" / f"{name}.jsonl").append(row)

    def write_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Samples of the probe prompts."""
        if self.layout.is_main and rows:
            RunDirLines(self.folder.samples(step)).replace(rows)

    def save(self, policy: Policy, state: Mapping[str, Any]) -> None:
        """A checkpoint after `state["step"]`, unless it is there already."""
        step = int(state["step"])
        if self._have(step):
            return
        checkpoint.save(policy, self.folder.checkpoints, step, dict(state), keep=self.config.checkpoint.keep)

    def _have(self, step: int) -> bool:
        there = self.folder.checkpoint(step).exists()
        return broadcast_json(there, source=0, group=self.layout.control) if self.layout.world_size > 1 else there

    def write_labels(self, supervised: bool, uses: Mapping[str, int]) -> None:
        """Every use of labels, over all replicas."""
        total: dict[str, int] = {}
        for part in gather_from_leaders(dict(uses), self.layout):
            for use, count in part.items():
                total[use] = total.get(use, 0) + count
        if self.layout.is_main:
            write_json(self.folder.labels, {"supervised": supervised, "uses": dict(sorted(total.items()))})

    def end(self, state: State, step: int, *, exit_code: int, reason: str) -> None:
        """Say how the run ended."""
        if self.layout.is_main:
            if state == "done":
                self.folder.mark_done()
            self.folder.write_status(state, step, exit_code=exit_code, reason=reason)


class RunDirLines:
    """A small JSON-lines file of the run folder, each row with its `step` where it has one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one row."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def replace(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write all rows at once."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))

    def truncate(self, step: int) -> None:
        """Keep the whole rows up to `step`."""
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        write_text(self.path, "".join(kept))


def _differences(path: Path, config: Config) -> list[str]:
    """Settings of a run's resolved config that a continuation may not change, as `key: old -> new`."""
    old = _flat(OmegaConf.to_container(OmegaConf.load(path)))
    new = _flat(config.model_dump(mode="json"))
    keys = sorted(k for k in {*old, *new} if old.get(k) != new.get(k) and not k.startswith(CHANGEABLE))
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in keys]


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {k: v for name, branch in tree.items() for k, v in _flat(branch, f"{prefix}{name}.").items()}


def _hash_folder(folder: Path) -> str:
    """SHA-256 over names, sizes and (for small files) contents of a model folder."""
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.iterdir() if p.is_file()):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        if file.stat().st_size <= 64 << 20:
            digest.update(file.read_bytes())
    return digest.hexdigest()
