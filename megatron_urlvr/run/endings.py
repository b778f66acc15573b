"""How a run ends: for every way its exit code, its words in status.json, and what it leaves behind."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..distributed.layout import Layout
from ..exit_codes import DISK_FULL, ExitCode, UnusableInput
from ..loop.collapse_watch import Collapsed
from ..policy.checkpoint import CheckpointError
from ..policy.optimizer import NonFiniteError
from ..rewards.base import NonFiniteScoreError
from ..rollout.faults import Abandoned, RolloutFailed
from .folder import State
from .interrupts import Preempted

if TYPE_CHECKING:
    from ..train import Trainer


@dataclass(frozen=True)
class Ending:
    """What `status.json` and the process say at the end."""

    state: State
    code: ExitCode
    reason: str
    agreed: bool = True
    """Every rank ends like this at the same place, so that they can still exchange something."""


def run_to_its_end(trainer: Trainer) -> int:
    """Run; returns the exit code. UnusableInput and what nobody foresaw are recorded and raised again."""
    try:
        ending = _ending_of(trainer)
        trainer.files.commit()
    except BaseException as error:
        ending, foreseen = _failure(error)
        _record(trainer, ending)
        if not foreseen:
            raise
    else:
        _record(trainer, ending)
    if trainer.parts.layout.is_main:
        print(f"{ending.state}: {ending.reason}", file=sys.stdout if ending.state == "done" else sys.stderr, flush=True)
    return int(ending.code)


def ended_before_it_began(error: RolloutFailed | Abandoned, layout: Layout) -> int:
    """The exit code of a run whose servers did not come before its policy was built; on every rank alike. The run's
    folder is as it was."""
    if isinstance(error, Abandoned):
        ending = Ending("preempted", ExitCode.PREEMPTED, "a signal while servers were waited for; nothing was changed")
    else:
        ending = Ending("failed", ExitCode.NO_SERVERS, f"{error}; the same command starts again")
    if layout.is_main:
        print(f"{ending.state}: {ending.reason}", file=sys.stderr, flush=True)
    return int(ending.code)


def _ending_of(trainer: Trainer) -> Ending:
    """Run to an end that the program knows, and save what belongs to it."""
    try:
        trainer.run()
    except (Preempted, Abandoned):
        return _preempted(trainer)
    except Collapsed as alarm:
        return _collapsed(trainer, alarm)
    except RolloutFailed as error:
        return _no_servers(trainer, error)
    except (NonFiniteError, NonFiniteScoreError) as error:
        return _non_finite(trainer, error)
    return Ending("done", ExitCode.DONE, f"{trainer.step} steps")


def _preempted(trainer: Trainer) -> Ending:
    signal = trainer.interrupts.received or "a signal on another rank"
    if trainer.completed is None:
        reason = f"{signal} before step 0 was complete; the same command starts again"
    else:
        trainer.save()
        reason = f"{signal}; saved after step {trainer.completed['step']}, from where the same command resumes"
    return Ending("preempted", ExitCode.PREEMPTED, reason)


def _collapsed(trainer: Trainer, alarm: Collapsed) -> Ending:
    reason = str(alarm)
    if trainer.watch.settings.action == "rollback":
        kept = trainer.roll_back(alarm)
        reason += f"; rolled back to step {trainer.step}" if kept else "; no snapshot from before it is left"
    trainer.save()
    return Ending("stopped", ExitCode.STOPPED, reason)


def _no_servers(trainer: Trainer, error: RolloutFailed) -> Ending:
    reason = str(error)
    if trainer.completed is None:
        reason += "; nothing was trained yet, and the same command starts again"
    else:
        trainer.save()
        reason += f"; saved after step {trainer.step}, from where the same command resumes"
    return Ending("failed", ExitCode.NO_SERVERS, reason)


def _non_finite(trainer: Trainer, error: Exception) -> Ending:
    reason = f"step {trainer.step + 1}: {error}"
    if trainer.completed is not None and trainer.untouched:
        trainer.save()
        reason += f"; the weights before it are saved as the checkpoint of step {trainer.step}"
    trainer.feed.forget_after(trainer.step)  # or the same batch would be met again
    if trainer.groups:
        path = trainer.files.record(trainer.step + 1, trainer.groups)
        folder = trainer.files.folder.path
        reason += (
            f"; its batch is kept in {path}, which rollout.engine=replay rollout.replay_from={folder} eval.every=0"
            " meets again"
        )
    return Ending("failed", ExitCode.NON_FINITE, reason)


def _failure(error: BaseException) -> tuple[Ending, bool]:
    """The ending, and whether its reason says all there is to say: no traceback is needed then."""
    if isinstance(error, CheckpointError):
        return Ending("failed", ExitCode.FAILED, str(error)), True
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        reason = f"no space left ({error}); free some, and the same command resumes from the last checkpoint"
        return Ending("failed", ExitCode.FAILED, reason, agreed=False), True
    if isinstance(error, KeyboardInterrupt):
        reason = "interrupted again, so nothing was saved; the same command resumes from the last checkpoint"
        return Ending("preempted", ExitCode.PREEMPTED, reason, agreed=False), True
    if isinstance(error, UnusableInput):
        return Ending("failed", ExitCode.UNUSABLE_INPUT, str(error), agreed=False), False
    return Ending("failed", ExitCode.FAILED, f"{type(error).__name__}: {error}", agreed=False), False


def _record(trainer: Trainer, ending: Ending) -> None:
    """Write labels.json and status.json, as far as the disk still takes them."""
    layout, files = trainer.parts.layout, trainer.files
    told_by = "" if ending.agreed or layout.world_size == 1 else f"rank {layout.rank}: "
    step = 0 if trainer.completed is None else int(trainer.completed["step"])
    try:
        if ending.agreed or layout.world_size == 1:
            files.write_labels(trainer.parts.reward.supervised, trainer.parts.labels.uses)
        files.end(ending.state, step, exit_code=int(ending.code), reason=told_by + ending.reason)
    except OSError as error:
        print(f"status.json of {files.folder.path} could not be written: {error}", file=sys.stderr, flush=True)
