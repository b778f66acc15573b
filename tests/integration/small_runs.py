"""A run small enough for tests, the command as a user calls it, and what two equal runs have in common."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_urlvr import cli
from megatron_urlvr.run.folder import RunDir

TASK = {"task": "chain_sum", "settings": {"digits": 3}}
PRETRAIN = {
    "run": {"name": "tiny", "seed": 0, "steps": 60, "batch": 64},
    "data": {**TASK, "max_new_tokens": 12, "held_out": 8},
    "model": {"layers": 2, "hidden": 32, "ffn": 64, "heads": 4, "kv_heads": 2},
    "optim": {"lr": 5.0e-3},
    "snapshots": {"base": {"step": 60}},
}
TRAIN = {
    "run": {"name": "small", "steps": 6, "seed": 1},
    "data": {"max_prompt_tokens": 8, "train": {**TASK, "size": 64}},
    "eval": {"every": 3, "sets": {"held_out": {**TASK, "size": 8, "samples": 2, "base_votes": 4}}},
    "rollout": {"prompts": 4, "n_votes": 4, "max_new_tokens": 12},
    "reward": {"terms": {"main": {"name": "trajectory_entropy", "aggregation": "sum"}}},
    "optim": {"lr": 1.0e-3},
    "checkpoint": {"every": 2, "keep": 2},
    "monitor": {"tensorboard": False, "probes": 2},
}


@dataclass(frozen=True)
class Outcome:
    """What a command left on the terminal."""

    code: int
    out: str
    err: str


class Command:
    """`urlvr(...)` in this process, through the entry point; an error that would be a traceback is raised."""

    def __init__(self, capsys: Any, monkeypatch: Any) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch

    def __call__(self, *arguments: object) -> Outcome:
        self._monkeypatch.setattr(sys, "argv", ["urlvr", *map(str, arguments)])
        self._capsys.readouterr()
        code: int | str | None = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        captured = self._capsys.readouterr()
        return Outcome(int(code or 0), captured.out, captured.err)


def write_config(path: Path, tree: dict[str, Any], **sections: dict[str, Any]) -> Path:
    """`tree` as YAML at `path`, with `sections` laid over its own, key by key."""
    merged = {name: {**tree.get(name, {}), **sections.get(name, {})} for name in {**tree, **sections}}
    path.write_text(yaml.safe_dump(merged))
    return path


def status(run: Path) -> dict[str, Any]:
    """status.json."""
    return json.loads((run / "status.json").read_text())


def rows(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock decides."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


def checkpoints(run: Path) -> list[str]:
    """Names of the checkpoints, oldest first."""
    folder = run / "checkpoints"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def weights(run: Path, step: int) -> dict[str, bytes]:
    """Weights, optimizer, random state and place in the data of a checkpoint, as bytes."""
    files = sorted(RunDir(run).checkpoint(step).iterdir())
    return {file.name: file.read_bytes() for file in files if file.suffix in (".distcp", ".safetensors", ".json")
            and file.name != "manifest.json"}  # fmt: skip


def assert_same_run(one: Path, other: Path, *, step: int) -> None:
    """Both are at `step`, and metrics, evaluations, samples, label uses and weights are the same to the bit."""
    assert rows(one) == rows(other)
    for folder in ("evals", "samples"):
        files = [{f.name: f.read_bytes() for f in (run / folder).glob("*.jsonl")} for run in (one, other)]
        assert files[0], f"{one} has no {folder}"
        assert files[0] == files[1]
    assert (one / "labels.json").read_bytes() == (other / "labels.json").read_bytes()
    assert weights(one, step) == weights(other, step)


@contextmanager
def at_step(monkeypatch: Any, step: int, act: Callable[[], object]) -> Iterator[None]:
    """`act` in the middle of `step`: after its responses are generated, before anything is made of them."""
    from megatron_urlvr import train

    original, seen = train.Trainer.observe, []

    def observed(self: Any, groups: Any, results: Any, at: int) -> Any:
        if at == step and not seen:
            seen.append(at)
            act()
        return original(self, groups, results, at)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "observe", observed)
        yield
    assert seen == [step], f"step {step} was never reached"


def send(number: int) -> Callable[[], None]:
    """Send a signal to this process."""
    return lambda: os.kill(os.getpid(), number)
