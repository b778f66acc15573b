"""The replay engine: recorded rollouts in place of sampling, so that training is debugged without any engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..exit_codes import UnusableInput
from ..types import Group, Prompt, Sampling
from .engine import RolloutEngine
from .records import read_groups


def rollout_file(run: Path, step: int) -> Path:
    """Where a run keeps the rollouts of `step`."""
    return run / "rollouts" / f"step_{step:06d}.jsonl.zst"


class ReplayEngine(RolloutEngine):
    """Serves the groups recorded by another run, by prompt id, one step's file after the other.

    They are taken as if they had just been sampled. Where the recording run's weights were others (another reward, or
    `run.rollout_only`), what is trained on after the first step is off-policy; `algorithm.correction` can weigh it.
    """

    def __init__(self, run: str | Path) -> None:
        self.run = Path(run)
        self.step = 0
        self.version = 0
        self._groups: dict[str, Group] = {}
        if not any(rollout_file(self.run, 1).parent.glob("step_*.jsonl.zst")):
            raise UnusableInput(
                f"rollout.replay_from = {run}: there are no recorded rollouts in {self.run / 'rollouts'};"
                " record some with rollout.record=true"
            )

    def begin_step(self, step: int) -> None:
        """Serve the rollouts of `step` from now on. UnusableInput when they were not recorded."""
        path = rollout_file(self.run, step)
        if not path.exists():
            raise UnusableInput(f"rollout.replay_from = {self.run}: {path.name} was not recorded; lower run.steps")
        self.step = step
        recorded = [each for group in read_groups(path) for each in (group, *group.beside)]
        self._groups = {group.prompt.id: _bare(group) for group in recorded}

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Group]:
        """The recorded group of each prompt. UnusableInput when one is missing, too small, or of another text."""
        for prompt in prompts:
            group = self._groups.get(prompt.id)
            if group is None:
                raise UnusableInput(
                    f"rollout.replay_from = {self.run}: step {self.step} holds no prompt {prompt.id!r};"
                    " replay needs the recording run's data and seed"
                )
            if group.prompt.tokens != prompt.tokens:
                raise UnusableInput(
                    f"rollout.replay_from = {self.run}: prompt {prompt.id!r} reads {group.prompt.text!r} there and"
                    f" {prompt.text!r} here; replay needs the recording run's data and tokenizer"
                )
            if len(group) < sampling.n:
                raise UnusableInput(
                    f"rollout.n_votes = {sampling.n}, but step {self.step} of {self.run} recorded {len(group)} samples"
                )
            yield Group(prompt, group.samples[: sampling.n])

    def begin_update(self, version: int) -> None:
        """Weights change nothing here."""
        self.version = version

    def update(self, bucket: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Drains the stream."""
        for _ in bucket:
            pass

    def end_update(self) -> None:
        """See RolloutEngine."""


def _bare(group: Group) -> Group:
    """Without what the recording run computed: the replaying run grades, scores and rewards by itself."""
    for sample in group.samples:
        sample.stats = None
    recorded: dict[str, Any] = {}
    return Group(group.prompt, group.samples, [], recorded)
