"""The real server keeps the contract that the fake one keeps (tests/unit/rollout)."""

from __future__ import annotations

import pytest
from server_contract import ServerContract, Target


class TestSGLang(ServerContract):
    @pytest.fixture
    def target(self, sglang_server: Target) -> Target:
        return sglang_server
