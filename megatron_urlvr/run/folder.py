"""A run's folder: where each file is, and how it is written so that a crash at any moment leaves it readable."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from ..exit_codes import UnusableInput
from .provenance import provenance

if TYPE_CHECKING:
    from ..config.base import Section

State = Literal["running", "done", "preempted", "failed", "stopped"]

_held: set[Path] = set()
"""Lock files that this process holds: POSIX locks do not keep a process from locking its own file twice."""


class RunLocked(UnusableInput):
    """Another process works in the run folder."""


@dataclass(frozen=True)
class Status:
    """What `status.json` says. It is the authority on how a run stands."""

    state: State
    step: int
    """Steps that are completed."""
    exit_code: int | None = None
    """None while the run goes on."""
    reason: str = ""
    """In words, for people."""
    updated: str = ""
    """UTC, ISO 8601."""


class RunDir:
    """The folder of one run. Nothing is created before `create`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"RunDir({str(self.path)!r})"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def provenance(self) -> Path:
        return self.path / "provenance.json"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def labels(self) -> Path:
        return self.path / "labels.json"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def snapshots(self) -> Path:
        """Ring of checkpoints to roll back to, under `monitor.collapse.action: rollback`."""
        return self.path / "snapshots"

    @property
    def report(self) -> Path:
        return self.path / "report"

    @property
    def done(self) -> Path:
        """Marker of a completed run: an empty file."""
        return self.path / "DONE"

    @property
    def servers(self) -> Path:
        """Where rollout servers announce themselves."""
        return self.path / "servers"

    @property
    def ledger(self) -> Path:
        """Finished groups of steps that no checkpoint has committed yet."""
        return self.path / "ledger"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / step_name(step)

    def rollouts(self, step: int) -> Path:
        """Recorded rollouts of `step`."""
        return self.path / "rollouts" / f"{step_name(step)}.jsonl.zst"

    def evaluations(self, eval_set: str) -> Path:
        """How many samples of each problem were right, one row an evaluation of `eval_set`."""
        return self.path / "evals" / f"{eval_set}.jsonl"

    def samples(self, step: int) -> Path:
        """Samples of the probe prompts at `step`."""
        return self.path / "samples" / f"{step_name(step)}.jsonl"

    def samples_from(self, step: int) -> list[Path]:
        """The files of probe samples at `step` and later ones."""
        found = self.samples(0).parent.glob("step_*.jsonl")
        return sorted(path for path in found if int(path.stem.removeprefix("step_")) >= step)

    def create(self) -> None:
        """Make the folder. UnusableInput when that is not possible."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UnusableInput(f"run.dir = {str(self.path)!r} cannot be made a folder: {error.strerror}.") from error

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process; taken by the first rank alone.

        A POSIX record lock: the system releases it when the process ends, however it ends, and children that outlive
        it (grader processes) do not inherit it. RunLocked, naming the holder, when another process holds the folder.
        """
        self.create()
        path = (self.path / ".lock").resolve()
        if path in _held:
            raise RunLocked(f"{self.path} is in use by this very process (pid {os.getpid()}).")
        with _opened(path) as file:
            _lock(file, self.path)
            _held.add(path)
            try:
                file.truncate(0)
                file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}))
                file.flush()
                yield
            finally:
                _held.discard(path)

    def in_use(self) -> bool:
        """Whether some process holds the folder. A run that says it is `running` and that nobody holds was killed."""
        path = (self.path / ".lock").resolve()
        if path in _held:  # opening and closing the file here would give this process's own lock up
            return True
        if not path.exists():
            return False
        with path.open("rb") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as error:
                return error.errno in (errno.EACCES, errno.EAGAIN)
        return False

    def write_status(self, state: State, step: int, *, exit_code: int | None = None, reason: str = "") -> None:
        """Replace `status.json`."""
        write_json(self.status, asdict(Status(state, step, exit_code, reason, _now())))

    def read_status(self) -> Status | None:
        """What `status.json` says; None when there is none. UnusableInput for a damaged one."""
        raw = _object(self.status)
        if not raw:
            return None
        try:
            return Status(**{key: value for key, value in raw.items() if key in Status.__dataclass_fields__})
        except TypeError as error:
            raise UnusableInput(f"{self.status} does not say state and step: move it away.") from error

    def write_config(self, config: Section) -> None:
        """Replace `config.yaml` by the resolved config, which `load_config` reads back to an equal one."""
        from ..config.loader import to_yaml  # late, so that reading a run folder does not import OmegaConf

        write_text(self.config, to_yaml(config))

    def write_provenance(self, hashes: Mapping[str, str], changed: Sequence[str] = ()) -> None:
        """Replace `provenance.json`; what it said of earlier launches of this run moves to its list `earlier`.
        `changed`: settings that are others than the launch's before, as `key: old -> new`."""
        before = self.read_provenance()
        earlier = [*before.pop("earlier", []), before] if before else []
        launch = {"launched": _now(), **provenance(hashes), "changed": list(changed)}
        write_json(self.provenance, {**launch, "earlier": earlier})

    def read_provenance(self) -> dict[str, Any]:
        """What `provenance.json` says; empty when there is none. UnusableInput for a damaged one."""
        return _object(self.provenance)

    def mark_done(self) -> None:
        self.done.touch()

    def clear_done(self) -> None:
        """For a completed run that is continued with more steps."""
        self.done.unlink(missing_ok=True)


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; empty when there is no such file. UnusableInput for another content."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UnusableInput(f"{path} is no readable JSON ({error}): it was edited or damaged; move it away.") from error
    if not isinstance(found, dict):
        raise UnusableInput(f"{path} holds a {type(found).__name__}, where an object is expected: move it away.")
    return found


def step_name(step: int) -> str:
    """`step_000050`."""
    return f"step_{step:06d}"


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON, at once and durably."""
    write_text(path, json.dumps(value, indent=2, sort_keys=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text`, at once and durably."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content`: a reader sees the old or the new, also after a crash. OSError leaves the old."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems do not sync folders; the rename itself is still atomic there.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _opened(lock: Path) -> IO[str]:
    try:
        return lock.open("a+", encoding="utf-8")
    except OSError as error:
        raise UnusableInput(f"run.dir = {str(lock.parent)!r} cannot be written to: {error.strerror}.") from error


def _lock(file: IO[str], folder: Path) -> None:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise UnusableInput(
                f"{folder} cannot be locked ({error.strerror}): its file system does not support locks. "
                "Choose a run.dir on another one."
            ) from error
        file.seek(0)
        raise RunLocked(
            f"{folder} is in use by {_holder(file.read())}. Wait for it or stop it, or choose another run.dir."
        ) from error


def _holder(text: str) -> str:
    try:
        holder: Mapping[str, Any] = json.loads(text)
        return f"process {holder['pid']} on {holder['host']} (since {holder['since']})"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
