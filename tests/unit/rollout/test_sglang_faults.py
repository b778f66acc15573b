"""Servers that fail in every way: nothing lost, nothing doubled, no deadlock, and a clear end when nobody is left."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_faults import FAULTS
from fake_models import DiceModel
from fake_serving import serving
from fake_sglang import FakeServer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server_contract import engine_for, prompts, push

from megatron_urlvr.rollout import dispatch, pool
from megatron_urlvr.rollout.faults import Abandoned, RolloutFailed
from megatron_urlvr.rollout.sglang import SGLangEngine
from megatron_urlvr.types import Group, Sampling

KIND_OF = {
    "400": "http_4xx",
    "500": "http_5xx",
    "reset": "connection",
    "truncated": "truncated",
    "not_json": "truncated",
    "nan": "logprob",
    "short_logprobs": "logprob",
    "other_token": "logprob",
    "outside_vocabulary": "token_range",
    "too_many_tokens": "length",
    "wrong_request": "wrong_request",
    "stale": "version",
    "abort": "aborted",
    "went_on": "finish",
    "hang": "timeout",
}
PATIENT = {"timeout_s": 1.0, "health_every_s": 0.5, "health_timeout_s": 5.0, "wait_s": 20.0, "attempts": 1000}


@pytest.fixture(autouse=True, scope="module")
def quick_pace() -> Iterator[None]:
    """Probes and ticks in hundredths of a second."""
    before = pool.PROBE_S, dispatch.TICK_S
    pool.PROBE_S, dispatch.TICK_S = (0.01, 0.05), 0.01
    yield
    pool.PROBE_S, dispatch.TICK_S = before


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text("{}")
    return folder


def patient(
    count: int, folder: Path, work: Path, **settings: Any
) -> AbstractContextManager[tuple[SGLangEngine, list[FakeServer]]]:
    servers = [FakeServer(DiceModel(seed=k)) for k in range(count)]
    return serving(servers, folder, work, **PATIENT | {"transport": "disk"} | settings)


def exactly_once(groups: list[Group], count: int, n: int) -> None:
    """Every prompt has its samples, in order, whole."""
    assert sorted(group.prompt.id for group in groups) == sorted(f"p{k}" for k in range(count))
    for group in groups:
        assert [sample.index for sample in group] == list(range(n))
        for sample in group:
            assert sample.logp is not None
            assert sample.logp.shape == (len(sample.tokens),)
            assert bool(torch.isfinite(sample.logp).all())
            assert all(0 <= token < 21 for token in sample.tokens)


WEIGHTS = {"w": torch.ones(3)}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_counted_by_kind_and_the_sample_asked_for_again(fault: str, folder: Path, tmp_path: Path) -> None:
    with patient(2, folder, tmp_path, timeout_s=0.3 if fault == "hang" else 60) as (engine, servers):
        push(engine, WEIGHTS, 1)
        servers[0].faults = iter([fault])
        exactly_once(list(engine.generate(prompts(4), Sampling(4, 5))), 4, 4)
        counted = engine.metrics()
        assert counted[f"rollout/faults/{KIND_OF[fault]}"] >= 1
        assert fault == "hang" or counted["rollout/faults"] == 1  # on a slow machine others time out too


schedules = st.lists(st.sampled_from([None, None, "die", *FAULTS]), max_size=8)


@pytest.mark.slow
def test_any_schedule_of_faults_loses_and_doubles_nothing(
    folder: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    with patient(3, folder, tmp_path, timeout_s=0.05) as (engine, servers):
        version = itertools.count(1)

        @settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.lists(schedules, min_size=3, max_size=3), st.integers(1, 4), st.integers(1, 3))
        def run(plans: list[list[str | None]], count: int, n: int) -> None:
            push(engine, WEIGHTS, next(version))
            for server, plan in zip(servers, plans, strict=True):
                server.faults = iter(plan)
            exactly_once(list(engine.generate(prompts(count), Sampling(n, 4))), count, n)
            for server in servers:
                server.faults, server.dead_for = iter(()), 0

        run()


def test_a_server_is_never_given_more_than_its_limit(folder: Path, tmp_path: Path) -> None:
    with patient(2, folder, tmp_path) as (engine, servers):
        engine.limit = 3
        push(engine, WEIGHTS, 1)
        exactly_once(list(engine.generate(prompts(12), Sampling(4, 4))), 12, 4)
        assert max(server.most_at_once for server in servers) <= 3


def test_a_server_that_dies_comes_back_fenced_and_is_brought_up_to_date(folder: Path, tmp_path: Path) -> None:
    with patient(1, folder, tmp_path) as (engine, servers):
        push(engine, WEIGHTS, 1)
        servers[0].faults = iter([None, None, "die"])
        exactly_once(list(engine.generate(prompts(4), Sampling(4, 4))), 4, 4)
        assert servers[0].label == engine.versions.of(1)
        assert servers[0].calls["/update_weights_from_disk"] == 2


def test_a_server_that_fails_its_health_check_leaves_and_what_it_had_is_asked_for_elsewhere(
    folder: Path, tmp_path: Path
) -> None:
    with patient(2, folder, tmp_path, timeout_s=600, health_every_s=0.05) as (engine, servers):
        push(engine, WEIGHTS, 1)
        servers[0].faults, servers[0].sick = itertools.repeat("hang"), True
        exactly_once(list(engine.generate(prompts(4), Sampling(4, 4))), 4, 4)
        assert [health.up for health in engine.health()] == [False, True]


def test_with_no_server_left_the_run_waits_and_then_says_so(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with patient(1, folder, tmp_path, wait_s=1.5) as (engine, servers):
        push(engine, WEIGHTS, 1)
        servers[0].dead_for = 10**9
        with pytest.raises(
            RolloutFailed, match=r"no rollout server for . s \(servers.wait_s = 1.5\): http://127.0.0.1"
        ):
            list(engine.generate(prompts(2), Sampling(2, 4)))
        assert capsys.readouterr().err.count("waiting for a rollout server") == 1


def test_without_any_server_at_the_start_the_run_waits_and_then_says_so(folder: Path, tmp_path: Path) -> None:
    engine = engine_for([], folder, tmp_path, wait_s=0)
    try:
        with pytest.raises(RolloutFailed, match="no server is announced in"):
            engine.begin_update(1)
    finally:
        engine.close()


def test_a_sample_that_nobody_can_answer_ends_the_run_with_the_reason(folder: Path, tmp_path: Path) -> None:
    with patient(2, folder, tmp_path, attempts=5) as (engine, servers):
        push(engine, WEIGHTS, 1)
        for server in servers:
            server.faults = itertools.repeat("400")
        with pytest.raises(RolloutFailed, match=r"failed 5 times \(servers.attempts\), last on .*as scheduled"):
            list(engine.generate(prompts(1), Sampling(1, 4)))


def test_a_process_that_is_asked_to_stop_gives_up_waiting(folder: Path, tmp_path: Path) -> None:
    with patient(1, folder, tmp_path, timeout_s=600, health_every_s=600) as (engine, servers):
        push(engine, WEIGHTS, 1)
        servers[0].faults = itertools.repeat("hang")
        engine.interrupted = lambda: True
        started = time.monotonic()
        with pytest.raises(Abandoned):
            list(engine.generate(prompts(1), Sampling(1, 4)))
        assert time.monotonic() - started < 60


def test_the_api_key_goes_with_every_request(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("URLVR_API_KEY", "s3cret")
    with patient(1, folder, tmp_path) as (engine, servers):
        servers[0].key = "s3cret"
        push(engine, WEIGHTS, 1)
        exactly_once(list(engine.generate(prompts(2), Sampling(2, 4))), 2, 2)
        for file in tmp_path.rglob("*"):
            assert not file.is_file() or b"s3cret" not in file.read_bytes()
