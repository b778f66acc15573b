"""A small valid training config that tests bend."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from megatron_urlvr.config.base import Section
from megatron_urlvr.config.errors import ConfigError
from megatron_urlvr.config.loader import load_config
from megatron_urlvr.config.root import Config

BASE = """
    run: {name: small, dir: runs/small, steps: 10, seed: 0}
    model: {path: bases/small}
    data: {train: {task: chain_sum, size: 64}}
    rollout: {prompts: 8, n_votes: 4, max_new_tokens: 16}
    reward: {terms: {main: {name: trajectory_entropy, aggregation: sum, weight: 0.5, normalize: true}}}
    optim: {lr: 1e-3}
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """`write(text, name)` writes a YAML file and returns its path; without a text, the small valid config."""

    def _write(text: str = BASE, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return path

    return _write


@pytest.fixture
def violations() -> Callable[..., list[str]]:
    """`violations(path, overrides, model)`: the sentences with which loading fails."""

    def _violations(path: Path, overrides: Sequence[str] = (), model: type[Section] = Config) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load_config(path, overrides, model)
        return list(caught.value.violations)

    return _violations
