"""A router before the servers: responses come through it, control calls do not, and it may fail."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
from fake_models import DiceModel
from fake_sglang import FakeServer
from server_contract import engine_for, prompts, push

from megatron_urlvr.config.servers import ServersSection
from megatron_urlvr.types import Sampling


def test_responses_come_through_the_router_and_control_calls_do_not(tmp_path: Path) -> None:
    # One fake is both: behind the first address a server, behind the other what a router would pass on.
    server, router = FakeServer(DiceModel()), FakeServer(DiceModel())
    (tmp_path / "model").mkdir()
    pools = {"policy": {"urls": [server.url], "router": router.url}}
    engine = engine_for([], tmp_path / "model", tmp_path, transport="disk", pools=pools)
    try:
        push(engine, {"w": torch.zeros(1)}, 0)
        router.label = server.label
        assert all(len(group) == 4 for group in engine.generate(prompts(4), Sampling(4, 8)))
        assert (router.calls["/generate"], server.calls["/generate"]) == (16, 0)
        assert set(router.calls) == {"/generate"}
        assert engine.metrics()["rollout/faults"] == 0
    finally:
        engine.close()
        server.stop()
        router.stop()


def test_what_fails_on_the_way_is_asked_of_the_server_itself(tmp_path: Path) -> None:
    with socket.socket() as nobody:  # bound, never listening
        nobody.bind(("127.0.0.1", 0))
        server = FakeServer(DiceModel())
        (tmp_path / "model").mkdir()
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        pools = {"policy": {"urls": [server.url], "router": url}}
        engine = engine_for([], tmp_path / "model", tmp_path, transport="disk", pools=pools)
        try:
            push(engine, {"w": torch.zeros(1)}, 0)
            assert all(len(group) == 4 for group in engine.generate(prompts(2), Sampling(4, 8)))
            assert server.calls["/generate"] == 8
            assert engine.metrics()["rollout/faults/connection"] == 8
            assert all(one.up for one in engine.health()), "the server is not to blame"
        finally:
            engine.close()
            server.stop()


def test_a_router_is_an_address_like_a_servers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="router = 'ftp://x'"):
        ServersSection.model_validate({"pools": {"policy": {"router": "ftp://x"}}})
    with pytest.raises(ValueError, match="only the pool 'policy' is asked through a router"):
        ServersSection.model_validate({"pools": {"policy": {}, "judge": {"router": "http://127.0.0.1:1"}}})
