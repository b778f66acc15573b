"""Runs on servers: batches are generated ahead within the bound, and a kill costs no group that was finished.

The servers are fakes in this process, with a pace, so that responses meet updates of the weights.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_models import DiceModel
from fake_sglang import FakeServer
from small_runs import Command, checkpoints, rows, status

from megatron_urlvr.rollout.ledger import Ledger
from megatron_urlvr.rollout.records import group_from_record, read_records
from megatron_urlvr.rollout.replay import rollout_file
from megatron_urlvr.types import Group

AHEAD = ["rollout.engine=sglang", "eval.every=0", "rollout.record=true", "algorithm.correction.old_logp=rollout"]


@pytest.fixture
def serving(base: Path) -> Iterator[Callable[..., list[str]]]:
    """`serving(count)` starts servers; returns them, and the settings by which a run finds them."""
    started: list[FakeServer] = []

    def _serving(count: int, seconds: float = 0.002) -> tuple[list[FakeServer], list[str]]:
        vocab = json.loads((base / "config.json").read_text())["vocab_size"]
        for k in range(count):
            pace = random.Random(k)
            server = FakeServer(
                DiceModel(vocab, seed=k), vocab_size=vocab, pace=lambda pace=pace: seconds * 2 * pace.random()
            )
            started.append(server)
        urls = ",".join(server.url for server in started)
        return started, [*AHEAD, f"servers.pools.policy.urls=[{urls}]", "servers.wait_s=30"]

    yield _serving
    for server in started:
        server.stop()


def trained(run: Path, step: int) -> list[Group]:
    """What step `step` was trained on."""
    return [group_from_record(record) for record in read_records(rollout_file(run, step))]


def ages(run: Path, step: int) -> Counter[int]:
    """Tokens of `step` by the age of their weights. Step s trains the weights of version s - 1."""
    found: Counter[int] = Counter()
    for group in trained(run, step):
        for sample in group:
            for age, tokens in sample.ages(step - 1):
                found[age] += tokens
    return found


@pytest.mark.parametrize(("bound", "transport", "pause"), [(1, "disk", "in_place"), (2, "group", "retract")])
def test_batches_are_generated_ahead_and_no_token_is_older_than_the_bound(
    urlvr: Command, config: Path, serving: Any, tmp_path: Path, bound: int, transport: str, pause: str
) -> None:
    servers, settings = serving(2, 0.02)
    settings += [f"servers.transport={transport}", f"servers.pause={pause}", f"rollout.max_staleness={bound}"]
    outcome = urlvr("train", config, *settings, "servers.pools.policy.concurrency=2")
    assert outcome.code == 0, outcome.err
    run = tmp_path / "run"
    seen: Counter[int] = Counter()
    for row in rows(run)[1:]:
        found = ages(run, row["step"])
        assert set(found) <= set(range(bound + 1))
        assert row["rollout/age_max"] == max(found)
        tokens = sum(found.values())
        assert row["rollout/age"] == pytest.approx(sum(age * count for age, count in found.items()) / tokens)
        assert row["rollout/aged_tokens"] == pytest.approx(1 - found[0] / tokens)
        assert row["rollout/faults"] == 0
        seen += found
    assert max(seen) > 0  # how old they are beyond that depends on who is faster
    spans = [sample.spans for step in range(1, 7) for group in trained(run, step) for sample in group]
    assert any(spans), "no response met an update"
    assert all(count == 1 for server in servers for count in server.asked.values()), "a response was asked for twice"


def test_a_synchronous_run_trains_on_the_newest_weights_alone(urlvr, config, serving, tmp_path) -> None:
    _, settings = serving(1)
    assert urlvr("train", config, *settings, "servers.transport=disk", "run.steps=3").code == 0
    assert [ages(tmp_path / "run", step).keys() for step in (1, 2, 3)] == [{0}] * 3
    assert not any(key.startswith("rollout/age") for row in rows(tmp_path / "run") for key in row)


IN_TURNS = ["servers.transport=disk", "servers.colocated=true", "checkpoint.every=2", "run.steps=4", "eval.every=2"]


def test_colocated_servers_sleep_while_the_policy_trains_and_only_then(urlvr, config, serving, tmp_path) -> None:
    servers, settings = serving(2, 0.0)
    assert urlvr("train", config, *settings, *IN_TURNS).code == 0
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1, 2, 3, 4]
    assert all(row["sync/servers"] == 2 and row["sync/seconds_sleep"] > 0 for row in rows(tmp_path / "run")[1:])
    for server in servers:
        # Once before the policy is built, and in each of the four steps; evaluations found them awake.
        assert server.calls["/release_memory_occupation"] == 5
        assert (server.memory.crashes, server.memory.released) == ([], set())
    assert not (tmp_path / "run" / "servers" / "ASLEEP").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_ends_while_its_servers_sleep_is_resumed_and_wakes_them(
    urlvr, config, serving, tmp_path, number
) -> None:
    run = tmp_path / "run"
    servers, settings = serving(2, 0.0)
    command = [sys.executable, "-c", KILLED, "3", "train", str(config), *settings, *IN_TURNS]
    pipe = subprocess.PIPE
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)
    assert process.stdout is not None
    assert any(line == "here\n" for line in process.stdout), process.stderr and process.stderr.read()
    assert [server.memory.released for server in servers] == [{"kv_cache", "weights"}] * 2
    process.send_signal(number)
    process.communicate("\n")
    assert process.returncode == (75 if number == signal.SIGTERM else -signal.SIGKILL)
    assert [server.label for server in servers] == ["asleep", "asleep"]

    assert urlvr("train", config, *settings, *IN_TURNS).code == 0
    assert [row["step"] for row in rows(run)] == [0, 1, 2, 3, 4]
    assert [server.memory.crashes for server in servers] == [[], []]


def test_without_its_servers_a_colocated_run_ends_before_it_begins(urlvr, config, tmp_path) -> None:
    wanted = ["rollout.engine=sglang", "servers.wait_s=0", *IN_TURNS]
    outcome = urlvr("train", config, *wanted)
    assert outcome.code == 5
    assert "no complete set of colocated servers for " in outcome.err
    assert "(servers.wait_s = 0): of 1 servers 0 are there" in outcome.err


def test_every_command_that_asks_servers_says_so_when_there_are_none(urlvr, config, tmp_path) -> None:
    none = ["rollout.engine=sglang", "servers.wait_s=0"]
    for command in (["eval", config], ["data", "select", config, "--keep", "mixed", "--out", tmp_path / "kept.jsonl"]):
        outcome = urlvr(*command, *none)
        assert outcome.code == 5
        told = outcome.err.strip().splitlines()[-1]
        assert told.startswith("no rollout server for ")
        assert "(servers.wait_s = 0): no server is announced in " in told
    assert not (tmp_path / "kept.jsonl").exists()


KILLED = """
import os, signal, sys
from megatron_urlvr import cli, train

original, wanted = train.Trainer.observe, int(sys.argv[1])
def observe(self, groups, results, step):
    if step == wanted:
        print("here", flush=True)
        sys.stdin.readline()
    return original(self, groups, results, step)
train.Trainer.observe = observe
sys.argv = ["urlvr", *sys.argv[2:]]
cli.main()
"""


@pytest.mark.parametrize("bound", [0, 1])
def test_a_killed_run_goes_on_with_the_groups_that_were_finished(urlvr, config, serving, tmp_path, bound) -> None:
    run = tmp_path / "run"
    servers, settings = serving(2)
    settings += [f"rollout.max_staleness={bound}", "servers.transport=group", "checkpoint.every=2", "run.steps=6"]
    command = [sys.executable, "-c", KILLED, "5", "train", str(config), *settings]
    pipe = subprocess.PIPE
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)
    assert process.stdout is not None
    assert any(line == "here\n" for line in process.stdout), process.stderr and process.stderr.read()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (status(run)["state"], rows(run)[-1]["step"], checkpoints(run)[-1]) == ("running", 4, "step_000004")

    kept = Ledger(run / "ledger", 0).groups(5)
    ahead = Ledger(run / "ledger", 0).groups(6)
    assert len(kept) == 4
    before = sum((server.asked for server in servers), Counter())
    sessions = {server.label.split("-")[0] for server in servers}

    assert urlvr("train", config, *settings).code == 0
    assert [row["step"] for row in rows(run)] == list(range(7))
    asked = sum((server.asked for server in servers), Counter()) - before
    finished = {f"{prompt}/{index}" for prompt in {**kept, **ahead} for index in range(4)}
    assert not finished & set(asked), "a finished group was generated again"
    for step, known in ((5, kept), (6, ahead)):
        used = {group.prompt.id: group for group in trained(run, step)}
        assert len(used) == 4
        for prompt, group in known.items():
            assert [sample.tokens for sample in used[prompt]] == [sample.tokens for sample in group]
    assert sum(row.get("rollout/from_ledger", 0) for row in rows(run)[5:]) == len(kept) + len(ahead)
    # Every server belongs to the new process, in a group of its own.
    assert {server.label.split("-")[0] for server in servers}.isdisjoint(sessions)
    assert all(server.calls["/init_weights_update_group"] == 2 for server in servers)
    assert Ledger(run / "ledger", 0).steps() == [5, 6], "what the oldest checkpoint has consumed is forgotten"
