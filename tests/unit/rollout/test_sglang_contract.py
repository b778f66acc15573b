"""The fake server keeps the contract that the real one keeps (tests/sglang)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_models import TransformersModel
from fake_sglang import FakeServer
from server_contract import VOCAB, ServerContract, Target
from tiny_models import write_qwen2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen2(tmp_path_factory.mktemp("model"), vocab_size=VOCAB)


class TestFakeServer(ServerContract):
    @pytest.fixture
    def target(self, folder: Path) -> Iterator[Target]:
        server = FakeServer(TransformersModel(folder), pace=lambda: 0.0)
        yield Target(server.url, folder)
        server.stop()
