"""Judges and teachers on servers of their own: asked like any server, never given weights, and bounded when silent."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_models import TransformersModel
from fake_sglang import FakeServer
from tiny_models import write_qwen2

from megatron_urlvr.config.servers import PoolSection, ServersSection
from megatron_urlvr.rollout.dispatch import Model
from megatron_urlvr.rollout.faults import RolloutFailed
from megatron_urlvr.rollout.frozen import FrozenServers
from megatron_urlvr.types import Prompt, Sampling

VOCAB = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen2(tmp_path_factory.mktemp("model"), vocab_size=VOCAB)


def servers_at(url: str, folder: Path, **limits: float) -> FrozenServers:
    section = ServersSection(
        pools={"policy": PoolSection(), "judge": PoolSection(urls=[url], context=64)},
        wait_s=limits.get("wait_s", 5.0),
        timeout_s=limits.get("timeout_s", 10.0),
        health_timeout_s=limits.get("health_timeout_s", 5.0),
    )
    return FrozenServers(
        section, pool="judge", folder=folder, model=folder, decode=lambda tokens: " ".join(map(str, tokens)),
        served=Model(VOCAB, frozenset({0})),
    )  # fmt: skip


def test_they_answer_with_the_weights_they_started_with(folder: Path) -> None:
    server = FakeServer(TransformersModel(folder))
    judge = servers_at(server.url, folder)
    prompts = [Prompt("train/1#judge0", "", (3, 4, 5)), Prompt("train/1#judge1", "", (6, 7))]
    groups = {group.prompt.id: group for group in judge.generate(prompts, Sampling(2, 4))}
    assert sorted(groups) == [prompt.id for prompt in prompts]
    assert all(len(group) == 2 and all(sample.tokens for sample in group) for group in groups.values())
    judge.close()
    server.stop()


def test_a_server_that_was_given_other_weights_is_fenced(folder: Path) -> None:
    server = FakeServer(TransformersModel(folder))
    server.label = "somebody-7"
    judge = servers_at(server.url, folder, wait_s=0.5)
    with pytest.raises(RolloutFailed, match=r"holds the weights somebody-7"):
        list(judge.generate([Prompt("p", "", (1,))], Sampling(1, 4)))
    judge.close()
    server.stop()


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of somebody who takes calls and never says anything."""
    listener = socket.create_server(("127.0.0.1", 0))
    taken: list[socket.socket] = []

    def take() -> None:
        while True:
            try:
                taken.append(listener.accept()[0])
            except OSError:
                return

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(5)
    for connection in taken:
        connection.close()


def test_a_judge_that_never_answers_ends_the_run_with_a_sentence(folder: Path, silent: str) -> None:
    judge = servers_at(silent, folder, wait_s=0.5, timeout_s=0.3, health_timeout_s=0.3)
    with pytest.raises(
        RolloutFailed, match=r"no rollout server for .*servers\.wait_s = 0\.5.*did not answer"
    ) as failed:
        list(judge.generate([Prompt("p", "", (1,))], Sampling(1, 4)))
    assert "\n" not in str(failed.value)
    judge.close()
