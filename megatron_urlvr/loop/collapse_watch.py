"""The collapse detector in a run: signals of every replica in, a verdict of rank 0 out, and what follows from it.

groups ─► signals (gathered) ─► metrics ─► detector on rank 0 ─► verdict, broadcast ─► warn | stop | roll back
                                                              ring of snapshots ◄── every few steps (roll back)
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config.monitor import CollapseSection
from ..distributed.exchange import gather_from_leaders
from ..distributed.layout import Layout, broadcast_json
from ..monitor.audit import merge, rates
from ..monitor.collapse import CollapseDetector
from ..monitor.collapse_signals import MajorityMemory, across_prompts, group_answers, repetition_sums
from ..policy import checkpoint
from ..policy.policy import Policy
from ..types import Group


class Collapsed(Exception):  # noqa: N818 - an ending that was asked for, not an error
    """The detector raised its alarm, and the run is to end. The message says what it saw; `onset` since when."""

    def __init__(self, text: str, onset: int) -> None:
        super().__init__(text)
        self.onset = onset


class CollapseWatch:
    """One run's detector, on every rank; rank 0 decides."""

    def __init__(self, settings: CollapseSection, layout: Layout, snapshots: Path, *, staleness: int) -> None:
        """`staleness`: steps by which responses may lag behind the weights."""
        self.settings, self.layout, self.snapshots = settings, layout, snapshots
        self.staleness = staleness
        self.detector = CollapseDetector(settings)
        self.majorities = MajorityMemory()
        self._new: Collapsed | None = None
        """The alarm that the last step raised."""
        self._ring_is_ours = False
        """What lies in the ring was written, or looked through, by this process."""

    def signals(self, groups: Sequence[Group]) -> dict[str, float]:
        """Label-free metrics of a step's groups over all replicas, the same on every rank."""
        mine = {"answers": group_answers(groups), "repetition": repetition_sums(groups)}
        parts = gather_from_leaders(mine, self.layout)
        answers = [group for part in parts for group in part["answers"]]
        # in an order that does not depend on how prompts are spread over replicas
        answers.sort(key=lambda group: str(group["prompt"]))
        metrics = rates(merge(part["repetition"] for part in parts))
        shared, flipped = across_prompts(answers), self.majorities.flip_rate(answers)
        metrics |= {} if shared is None else {"answers/across_prompts": shared}
        return metrics | ({} if flipped is None else {"vote/flip_rate": flipped})

    def observe(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Judge a step by its metrics; returns the metrics `collapse/score` and `collapse/alarm` (1 from the alarm on).
        A new alarm is told on stderr."""
        told: list[Any] | None = None
        if self.layout.is_main:
            verdict = self.detector.observe(step, metrics)
            told = [verdict.score, verdict.alarm, verdict.onset, verdict.text]
            if verdict.alarm == step:
                print(f"warning: {verdict.text}", file=sys.stderr, flush=True)
        if self.layout.world_size > 1:
            told = broadcast_json(told, source=0, group=self.layout.control)
        assert told is not None
        score, alarm, onset, text = told
        self._new = Collapsed(text, onset) if alarm == step else None
        return {"collapse/score": score, "collapse/alarm": float(alarm is not None)}

    def act(self) -> None:
        """Raise Collapsed, on every rank, where the last step raised the alarm and the run is not only to be warned.
        Called where the step is complete."""
        if self._new is not None and self.settings.action != "warn":
            raise self._new

    # -- snapshots ----------------------------------------------------------------------------------------------------

    def keep(self, policy: Policy, state: Mapping[str, Any]) -> None:
        """A snapshot after the completed step `state["step"]`, when one is due under `action: rollback`. Collective.
        `state`: the trainer's, as `RunFiles.save` takes it."""
        step = int(state["step"])
        if self.settings.action != "rollback":
            return
        if not self._ring_is_ours:
            self._drop_after(step)  # of a history that was given up, or of another life of this folder
            self._ring_is_ours = True
        if step % self.settings.snapshot_every:
            return
        trainer = {**state, "labels": gather_from_leaders(state["labels"], self.layout)}
        checkpoint.save(policy, self.snapshots, step, trainer, keep=self.settings.snapshots)

    def roll_back(self, policy: Policy, alarm: Collapsed) -> dict[str, Any] | None:
        """Restore the newest intact snapshot whose responses were not suspicious yet; returns the trainer's state of
        it, None where no such snapshot is left. Collective.

        Responses of step t come from the weights after t - 1: with the first suspicious ones at the onset, those of the
        step before were fine, and so were the weights after onset - 2 that gave them, or earlier ones by the staleness.
        """
        kept = [step for step, _ in checkpoint.list_checkpoints(self.snapshots)] if self.layout.is_main else []
        healthy = alarm.onset - 2 - self.staleness
        self._drop_after(max([healthy, *kept[-1:]]))  # the oldest, where the ring does not reach so far back
        path, _ = checkpoint.newest_intact(policy, self.snapshots)
        return None if path is None else checkpoint.load(policy, path)

    def _drop_after(self, step: int) -> None:
        if self.layout.is_main:
            for newer, path in checkpoint.list_checkpoints(self.snapshots):
                if newer > step:
                    shutil.rmtree(path, ignore_errors=True)
        if self.layout.world_size > 1:
            broadcast_json(None, source=0, group=self.layout.control)

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state, for checkpoints; rank 0's counts."""
        return {"detector": self.detector.state_dict(), "majorities": dict(self.majorities.state)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.detector.load_state_dict(state["detector"])
        self.majorities = MajorityMemory(state["majorities"])
