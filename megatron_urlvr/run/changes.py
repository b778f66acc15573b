"""What may differ between a run and its continuation, and in which words the rest is refused."""

from __future__ import annotations

from typing import Any

from ..analysis.runs import flatten
from ..config.root import Config

CHANGEABLE = (
    "run.steps",
    "run.resume",
    "run.threads",
    "run.name",
    "run.dir",
    "run.device",
    "monitor.",
    "checkpoint.",
    "eval.every",
    "rollout.engine",
    "rollout.replay_from",
    "rollout.record",
    "rollout.batch",
    "servers.",
    "model.recompute",
    "parallel.",
)
"""Settings, or beginnings of settings, that decide how long a run goes on, what it writes, whether responses are
sampled or read from records, and how the same arithmetic is laid out over processes and memory."""
FIXED = ("parallel.distributed_optimizer",)
"""Exceptions: one kind of optimizer does not read the other's checkpoints."""
HORIZON = "optim.schedule_steps"


def differences(before: Config, now: Config) -> tuple[list[str], list[str]]:
    """Settings that differ, as `key: old -> new`: those that a continuation may not change, and those that it may."""
    old, new = _settings(before), _settings(now)
    refused, allowed = list[str](), list[str]()
    for key in sorted({*old, *new}):
        if old.get(key) != new.get(key):
            free = key.startswith(CHANGEABLE) and key not in FIXED
            (allowed if free else refused).append(f"{key}: {old.get(key)} -> {new.get(key)}")
    return refused, allowed


def _settings(config: Config) -> dict[str, Any]:
    """Every setting by its dotted key. A schedule's horizon is the one that it has, written or not."""
    return flatten(config.model_dump(mode="json")) | {HORIZON: config.optim.horizon(config.run.steps)}
