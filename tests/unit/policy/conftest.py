"""One process's layout, and the model folders, policies and checkpoints that the policy tests share."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import write_qwen2
from training import SECTION, train

from megatron_urlvr.config.model import ModelSection
from megatron_urlvr.config.parallel import ParallelSection
from megatron_urlvr.distributed.layout import Layout, joined
from megatron_urlvr.policy import checkpoint
from megatron_urlvr.policy.policy import Policy

MakePolicy = Callable[..., Policy]


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    torch.set_num_threads(1)
    with joined(ParallelSection()) as layout:
        yield layout


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Qwen2 folders: `untied` and `tied` with two query heads a key-value head, `full` with as many of both."""
    root = tmp_path_factory.mktemp("models")
    return {
        "untied": write_qwen2(root / "untied"),
        "tied": write_qwen2(root / "tied", tied=True, seed=1),
        "full": write_qwen2(root / "full", kv_heads=4, seed=2),
        "single": write_qwen2(root / "single", kv_heads=1, seed=3),
    }


@pytest.fixture(scope="module")
def make_policy(layout: Layout, folders: dict[str, Path]) -> MakePolicy:
    """`make_policy("tied", optim=..., parallel={...}, model={...})`."""

    def make(
        name: str = "untied",
        *,
        parallel: dict[str, Any] | None = None,
        model: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Policy:
        section = ModelSection(path=str(folders[name]), **(model or {}))
        return Policy(section, ParallelSection(**(parallel or {})), layout, **kwargs)

    return make


@pytest.fixture
def make(make_policy: MakePolicy) -> MakePolicy:
    """`make("tied", distributed=False)`: with an optimizer."""

    def make(name: str = "untied", *, distributed: bool = True) -> Policy:
        return make_policy(name, optim=SECTION, parallel={"distributed_optimizer": distributed})

    return make


@pytest.fixture(scope="module")
def saved(make_policy: MakePolicy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of checkpoints after steps 1 and 2."""
    folder = tmp_path_factory.mktemp("saved")
    policy = make_policy(optim=SECTION)
    for step in (1, 2):
        train(policy, 1)
        checkpoint.save(policy, folder, step, {"step": step}, keep=2)
    return folder


@pytest.fixture
def copies(saved: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))
