"""One tiny base policy for all tests of this folder, and what they call."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_runs import PRETRAIN, TRAIN, Command, write_config

from megatron_urlvr.config.loader import load_config
from megatron_urlvr.config.pretrain import PretrainConfig


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that has begun to learn chains of three digits: most of its answers are parsable, a few right."""
    from megatron_urlvr.pretrain import main

    folder = tmp_path_factory.mktemp("bases")
    main(load_config(write_config(folder / "pretrain.yaml", PRETRAIN, run={"dir": str(folder)}), [], PretrainConfig))
    return folder / "base"


@pytest.fixture(scope="session", autouse=True)
def _quick_collections(base: Path) -> None:
    """What was imported by now stays, and need not be looked through again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_idle_threads() -> Iterator[None]:
    """A run's process groups keep threads until the last object that refers to them is collected."""
    yield
    gc.collect()


@pytest.fixture
def urlvr(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> Command:
    return Command(capsys, monkeypatch)


@pytest.fixture
def config(base: Path, tmp_path: Path) -> Path:
    """The file of a run in `tmp_path / "run"`."""
    return write_config(tmp_path / "small.yaml", TRAIN, run={"dir": str(tmp_path / "run")}, model={"path": str(base)})


@pytest.fixture(scope="session")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `config` from its first step to its last without a break."""
    from megatron_urlvr.train import main

    folder = tmp_path_factory.mktemp("whole")
    file = write_config(folder / "small.yaml", TRAIN, run={"dir": str(folder / "run")}, model={"path": str(base)})
    assert main(load_config(file)) == 0
    return folder / "run"
