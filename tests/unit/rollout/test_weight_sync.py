"""Updates reach every server, by broadcast or else by the snapshot, whoever refuses, dies or comes back."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_models import DiceModel
from fake_serving import empty_model, serving
from fake_sglang import FakeServer
from server_contract import engine_for, prompts, push

from megatron_urlvr.rollout.sglang import SGLangEngine
from megatron_urlvr.rollout.weight_sync import group as group_module
from megatron_urlvr.rollout.weight_sync import process_group
from megatron_urlvr.types import Sampling


class KeepingModel(DiceModel):
    """Remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: dict[str, torch.Tensor] = {}

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        self.weights |= {name: tensor.clone() for name, tensor in tensors.items()}


def keeping(count: int, work: Path, **settings: Any) -> AbstractContextManager[tuple[SGLangEngine, list[FakeServer]]]:
    servers = [FakeServer(KeepingModel()) for _ in range(count)]
    return serving(servers, empty_model(work), work, **{"sync_timeout_s": 5.0} | settings)


def weights(value: float) -> dict[str, torch.Tensor]:
    """A bucket of 1 MB holds one of them."""
    return {f"w{k}": torch.full((150_000,), value + k) for k in range(3)}


def holds(server: FakeServer, value: float) -> bool:
    model: Any = server.model
    return all(torch.equal(model.weights[name], tensor) for name, tensor in weights(value).items())


@pytest.mark.parametrize("transport", ["group", "disk"])
def test_every_server_holds_every_tensor_of_every_update(tmp_path: Path, transport: str) -> None:
    with keeping(2, tmp_path, transport=transport, bucket_mb=1) as (engine, servers):
        for version in (0, 1, 2):
            push(engine, weights(version), version)
            assert all(holds(server, version) for server in servers)
            assert [server.label for server in servers] == [engine.versions.of(version)] * 2
            assert engine.metrics()["sync/buckets"] == 3
        disk = [server.calls["/update_weights_from_disk"] for server in servers]
        groups = [server.calls["/init_weights_update_group"] for server in servers]
        assert (disk, groups) == (([0, 0], [1, 1]) if transport == "group" else ([3, 3], [0, 0]))


@pytest.mark.parametrize(
    "path",
    [
        "/init_weights_update_group",
        "/begin_weight_update",
        "/update_weights_from_distributed",
        "/end_weight_update",
    ],
)
def test_when_a_server_refuses_the_broadcast_all_read_the_snapshot_and_the_next_update_has_a_new_group(
    tmp_path: Path, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with keeping(1, tmp_path, bucket_mb=1) as (engine, servers):
        servers[0].refusing = {path}
        push(engine, weights(1), 1)
        assert holds(servers[0], 1)
        assert servers[0].calls["/update_weights_from_disk"] == 1
        assert "weights could not be broadcast" in capsys.readouterr().err
        servers[0].refusing = set()
        push(engine, weights(2), 2)
        assert holds(servers[0], 2)
        assert servers[0].calls["/update_weights_from_disk"] == 1


def test_a_server_that_is_lost_over_nccl_costs_the_group_and_not_the_trainer(tmp_path: Path, monkeypatch) -> None:
    """NCCL itself needs GPUs: gloo carries the tensors, and what torch would have read and aborted is noted."""
    made, aborted, make = [], [], process_group._new_process_group_helper

    def noting(*arguments: Any, **keywords: Any) -> Any:
        made.append((os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"], os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"]))
        return make(*arguments, **keywords)

    monkeypatch.setattr(process_group, "_new_process_group_helper", noting)
    monkeypatch.setattr(group_module, "abort", lambda group: aborted.append(group))
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")
    with keeping(1, tmp_path, bucket_mb=1) as (engine, servers):
        transport = engine.sync.transport
        push(engine, weights(1), 1)
        assert made == [("2", "0")]
        assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "3"
        assert "TORCH_NCCL_DUMP_ON_TIMEOUT" not in os.environ
        group = transport.group
        servers[0].refusing = {"/update_weights_from_distributed"}
        monkeypatch.setattr(transport, "backend", "nccl")
        push(engine, weights(2), 2)
        assert aborted == [group]
        assert (transport.group, transport._given_up) == (None, [])
        assert holds(servers[0], 2)
        transport._given_up.append(group)  # it is gloo's, and must outlive its broadcast


def test_when_a_server_goes_the_others_make_a_new_group(tmp_path: Path) -> None:
    with keeping(2, tmp_path) as (engine, servers):
        push(engine, weights(1), 1)
        servers[0].dead_for = 10**9
        push(engine, weights(2), 2)
        assert holds(servers[1], 2)
        assert servers[1].calls["/init_weights_update_group"] == 2
        assert servers[1].calls["/update_weights_from_disk"] == 0
        servers[0].dead_for = 0
        push(engine, weights(3), 3)
        assert all(holds(server, 3) for server in servers)
        assert servers[1].calls["/init_weights_update_group"] == 3


def test_with_no_server_at_an_update_generation_waits_for_one_that_reads_the_snapshot(tmp_path: Path) -> None:
    with keeping(1, tmp_path, wait_s=60) as (engine, servers):
        push(engine, weights(1), 1)
        servers[0].dead_for = 3
        push(engine, weights(2), 2)
        [group] = engine.generate(prompts(1), Sampling(2, 4))
        assert [sample.version for sample in group] == [2, 2]
        assert holds(servers[0], 2)


def test_another_replica_asks_only_servers_that_hold_the_newest_weights(tmp_path: Path) -> None:
    with keeping(2, tmp_path) as (engine, servers):
        other = engine_for([s.url for s in servers], tmp_path / "model", tmp_path)
        other.sync, other.versions.session = None, engine.versions.session
        try:
            push(engine, weights(1), 1)
            servers[0].label = "somebody else's"
            push(other, weights(1), 1)
            list(other.generate(prompts(4), Sampling(2, 4)))
            assert servers[0].calls["/generate"] == 0
            assert [health.why for health in other.health() if not health.up] == [
                f"fenced: it holds the weights somebody else's, wanted are {engine.versions.of(1)}"
            ]
        finally:
            other.close()
