"""A run folder as training leaves it, and a way to call the command as a user does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_urlvr import cli
from megatron_urlvr.config.loader import load_config
from megatron_urlvr.rollout.records import group_to_record, write_records
from megatron_urlvr.run.folder import RunDir
from megatron_urlvr.types import Group, Prompt, Sample, TokenStats

CONFIG = """
run: {name: small, dir: runs/small, steps: 10, seed: 3}
model: {path: bases/small}
data: {train: {task: chain_sum, size: 64}}
eval: {every: 5, sets: {held_out: {task: chain_sum, size: 16}}}
rollout: {prompts: 8, n_votes: 4, max_new_tokens: 16}
reward: {terms: {main: {name: trajectory_entropy, aggregation: sum}}}
optim: {lr: 1.0e-3}
"""


class Outcome:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def urlvr(monkeypatch, capsys) -> Callable[..., Outcome]:
    """`urlvr("config", "show", path)` calls the entry point in this process."""

    def _urlvr(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["urlvr", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return Outcome(int(caught.value.code or 0), captured.out, captured.err)

    return _urlvr


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def run(tmp_path: Path, config_file: Path) -> RunDir:
    """A run that rose and collapsed, with probes at steps 0 and 10 and rollouts recorded at step 4."""
    run = RunDir(tmp_path / "runs" / "small")
    run.create()
    run.write_config(load_config(config_file))
    run.write_status("done", 10, exit_code=0)
    accuracy = {0: 0.4, 5: 0.9, 10: 0.0}
    run.metrics.write_text(
        "".join(
            json.dumps({"step": step, "eval/held_out/avg@4": value, "eval/held_out/avg@4_se": 0.01}) + "\n"
            for step, value in accuracy.items()
        )
    )
    for step in (0, 10):
        rows = [
            {"prompt": "12=", "response": "c3#3", "answer": "3", "reward": -2.0, "correct": True},
            {"prompt": "12=", "response": "#4", "answer": "4", "reward": -1.0, "correct": False},
            {"prompt": "77=", "response": f"at {step}", "answer": None, "reward": -3.0, "correct": False},
        ]
        run.samples(step).parent.mkdir(exist_ok=True)
        run.samples(step).write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_records(run.rollouts(4), [group_to_record(group(index)) for index in range(3)])
    return run


def group(index: int) -> Group:
    """Two samples of 1 and 2 tokens, with log-probabilities -1 each."""
    samples = [
        Sample(
            prompt_id=f"train/{index}",
            index=i,
            tokens=[5] * (i + 1),
            text="long" if i else "short",
            finish="length" if i else "stop",
            answer="5",
            stats=TokenStats(logp=torch.full((i + 1,), -1.0)),
        )
        for i in range(2)
    ]
    return Group(Prompt(f"train/{index}", f"{index}0=", (1, 2)), samples, [0, 0])


@pytest.fixture
def in_fresh_python() -> Callable[[str], str]:
    """Runs code in a new interpreter and returns what it prints."""

    def _run(code: str) -> str:
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()

    return _run
