"""An engine on fake servers, for as long as a test needs it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fake_sglang import FakeServer
from server_contract import engine_for

from megatron_urlvr.rollout.sglang import SGLangEngine


@contextmanager
def serving(
    servers: Sequence[FakeServer], folder: Path, work: Path, **settings: Any
) -> Iterator[tuple[SGLangEngine, list[FakeServer]]]:
    """An engine with `settings` on `servers` of the model in `folder`; all of them end with the block."""
    engine = engine_for([server.url for server in servers], folder, work, **settings)
    try:
        yield engine, list(servers)
    finally:
        engine.close()
        for server in servers:
            server.stop()


def empty_model(work: Path) -> Path:
    """A folder that passes for a model's where nobody reads its weights."""
    (work / "model").mkdir()
    (work / "model" / "config.json").write_text("{}")
    return work / "model"
