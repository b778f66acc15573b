"""Servers on the trainer's GPUs: when they sleep, in which order they wake, and what becomes of those that do not."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_models import DiceModel
from fake_serving import empty_model, serving
from fake_sglang import FakeServer
from server_contract import engine_for, prompts, push

from megatron_urlvr.config.servers import ServersSection
from megatron_urlvr.exit_codes import UnusableInput
from megatron_urlvr.rollout.faults import Abandoned, RolloutFailed
from megatron_urlvr.rollout.sglang import SGLangEngine
from megatron_urlvr.rollout.sleep import ASLEEP, WAKING, marker, settle
from megatron_urlvr.types import Sampling

WEIGHTS = {"w": torch.ones(4)}
FALLING_ASLEEP = [
    "/pause_generation",
    "/abort_request",
    "/flush_cache",
    "/update_weight_version",
    "/release_memory_occupation kv_cache weights",
]
WAKING_UP = [
    "/update_weight_version",
    "/resume_memory_occupation weights",
    "/update_weights_from_disk",
    "/resume_memory_occupation kv_cache",
    "/flush_cache",
    "/update_weight_version",
    "/continue_generation",
]


def colocated(count: int, work: Path, **settings: Any) -> AbstractContextManager[tuple[SGLangEngine, list[FakeServer]]]:
    servers = [FakeServer(DiceModel(seed=k), pace=lambda: 0.002) for k in range(count)]
    settings = {"transport": "disk", "colocated": True, "sync_timeout_s": 5.0} | settings
    return serving(servers, empty_model(work), work, **settings)


def sampled(engine: SGLangEngine) -> set[int]:
    """Versions that a small batch came from."""
    return {sample.version for group in engine.generate(prompts(4), Sampling(2, 4)) for sample in group}


def test_memory_is_given_back_by_idle_servers_and_filled_before_it_is_used(tmp_path: Path) -> None:
    with colocated(2, tmp_path) as (engine, servers):
        push(engine, WEIGHTS, 0)
        for version in (1, 2):
            sampled(engine)
            for server in servers:
                server.called.clear()
            engine.sleep()
            assert [server.called for server in servers] == [FALLING_ASLEEP] * 2
            assert [(s.label, s.memory.released) for s in servers] == [(ASLEEP, {"kv_cache", "weights"})] * 2
            for server in servers:
                server.called.clear()
            push(engine, WEIGHTS, version)
            assert [server.called for server in servers] == [["/pause_generation", *WAKING_UP]] * 2
            assert engine.metrics()["sync/seconds_sleep"] > 0
            assert sampled(engine) == {version}
        assert [server.memory.crashes for server in servers] == [[], []]


def test_what_somebody_left_running_is_given_up_before_memory_goes(tmp_path: Path) -> None:
    with colocated(1, tmp_path) as (engine, [server]):
        push(engine, WEIGHTS, 0)
        flight = engine.start(prompts(4), Sampling(4, 40))
        next(flight)
        engine.sleep()
        flight.close()
        push(engine, WEIGHTS, 1)
        assert sampled(engine) == {1}
        assert server.memory.crashes == []


def test_a_server_that_dies_asleep_comes_back_awake_and_reads_the_weights(tmp_path: Path) -> None:
    with colocated(2, tmp_path) as (engine, servers):
        push(engine, WEIGHTS, 0)
        engine.sleep()
        servers[0].restart()
        push(engine, WEIGHTS, 1)
        assert sampled(engine) == {1}
        assert servers[0].calls["/resume_memory_occupation"] == 0
        assert [server.memory.crashes for server in servers] == [[], []]
        assert all(health.up for health in engine.health())


def test_a_server_that_is_gone_when_it_should_sleep_holds_no_memory(tmp_path: Path) -> None:
    with colocated(2, tmp_path) as (engine, servers):
        push(engine, WEIGHTS, 0)
        servers[0].dead_for = 1
        engine.sleep()
        assert servers[1].label == ASLEEP
        push(engine, WEIGHTS, 1)
        assert sampled(engine) == {1}


@pytest.mark.parametrize("path", ["/flush_cache", "/release_memory_occupation", "/pause_generation"])
def test_a_server_that_keeps_its_memory_ends_the_run_before_the_update(tmp_path: Path, path: str) -> None:
    with colocated(1, tmp_path, sync_timeout_s=0.3) as (engine, [server]):
        push(engine, WEIGHTS, 0)
        server.refusing = {path}
        with pytest.raises(RolloutFailed, match="did not give its memory back, which the update needs"):
            engine.sleep()


@pytest.mark.parametrize("path", ["/resume_memory_occupation", "/update_weights_from_disk"])
def test_a_server_that_fails_to_wake_is_not_touched_again(tmp_path: Path, path: str) -> None:
    with colocated(1, tmp_path, wait_s=1.5) as (engine, [server]):
        push(engine, WEIGHTS, 0)
        engine.sleep()
        server.refusing = {path}
        push(engine, WEIGHTS, 1)
        server.refusing = set()
        calls = server.calls[path]
        with pytest.raises(RolloutFailed, match="its label is 'waking'"):
            sampled(engine)
        assert (server.label, server.calls[path], server.calls["/health"]) == (WAKING, calls, 0)
        push(engine, WEIGHTS, 2)
        assert (server.label, server.calls[path], server.memory.crashes) == (WAKING, calls, [])


def test_a_server_that_missed_the_waking_is_woken_when_it_answers_again(tmp_path: Path) -> None:
    with colocated(2, tmp_path) as (engine, servers):
        push(engine, WEIGHTS, 0)
        engine.sleep()
        servers[0].refusing = {"/model_info"}
        push(engine, WEIGHTS, 1)
        assert servers[0].label == ASLEEP
        servers[0].refusing = set()
        for _ in range(50):
            sampled(engine)
            if all(health.up for health in engine.health()):
                break
        assert servers[0].label == engine.versions.of(1)
        assert servers[0].memory.crashes == []


def test_a_run_that_is_not_colocated_leaves_a_sleeping_server_alone(tmp_path: Path) -> None:
    with colocated(1, tmp_path) as (engine, [server]):
        push(engine, WEIGHTS, 0)
        engine.sleep()
        other = engine_for([server.url], tmp_path / "model", tmp_path / "other", transport="disk", wait_s=0.5)
        try:
            with pytest.raises(RolloutFailed, match="its label is 'asleep'"):
                push(other, WEIGHTS, 0)
            assert server.memory.crashes == []
        finally:
            other.close()


# -- before the policy is built -------------------------------------------------------------------------------------


def at_start(servers: list[FakeServer], work: Path, *, hosts: int = 1, stop: bool = False, **settings: Any) -> None:
    urls = {"pools": {"policy": {"urls": [server.url for server in servers]}}}
    section = ServersSection.model_validate(urls | {"transport": "disk", "colocated": True} | settings)
    settle(section, work, hosts=hosts, interrupted=lambda: stop)


def test_all_servers_sleep_before_the_policy_takes_memory_those_too_that_sleep_already(tmp_path: Path) -> None:
    servers = [FakeServer(DiceModel(), device="cuda", saver=True) for _ in range(2)]
    try:
        for _ in range(2):
            at_start(servers, tmp_path)
            assert [server.label for server in servers] == [ASLEEP, ASLEEP]
            assert [server.calls["/release_memory_occupation"] for server in servers] == [1, 1]
            assert marker(tmp_path).exists()
        assert [server.memory.crashes for server in servers] == [[], []]
    finally:
        for server in servers:
            server.stop()


def test_a_server_on_a_gpu_without_the_memory_saver_is_refused(tmp_path: Path) -> None:
    server = FakeServer(DiceModel(), device="cuda")
    try:
        with pytest.raises(UnusableInput, match="without --enable-memory-saver"):
            at_start([server], tmp_path)
        assert (server.label, marker(tmp_path).exists()) == ("default", False)
    finally:
        server.stop()


def test_servers_that_are_not_there_end_the_wait_and_so_does_a_signal(tmp_path: Path) -> None:
    missing = ServersSection.model_validate(
        {"pools": {"policy": {"count": 2}}, "transport": "disk", "colocated": True, "wait_s": 0}
    )
    with pytest.raises(RolloutFailed, match=r"of 6 servers 0 are there .* `urlvr rollout serve` on every host"):
        settle(missing, tmp_path, hosts=3, interrupted=lambda: False)
    with pytest.raises(Abandoned):
        settle(missing.model_copy(update={"wait_s": 60}), tmp_path, hosts=3, interrupted=lambda: True)
