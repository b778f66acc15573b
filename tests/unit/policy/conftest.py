"""One process's layout and the model folders that the policy tests share."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import write_qwen2

from megatron_urlvr.config.model import ModelSection
from megatron_urlvr.config.parallel import ParallelSection
from megatron_urlvr.distributed.layout import Layout, joined
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
