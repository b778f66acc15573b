"""`servers.verify`: weights that did not arrive as they were sent end the run, and those that did do not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fake_models import DiceModel
from fake_sglang import FakeServer
from safetensors.torch import load_file
from server_contract import engine_for, push
from tiny_models import write_qwen2

from megatron_urlvr.rollout.faults import RolloutFailed
from megatron_urlvr.rollout.weight_sync.buckets import make_bucket
from megatron_urlvr.rollout.weight_sync.verify import Checksums, read_checksums


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen2(tmp_path_factory.mktemp("model"), vocab_size=21)


@pytest.mark.parametrize("transport", ["group", "disk"])
def test_weights_that_arrive_are_verified(model: Path, tmp_path: Path, transport: str) -> None:
    server, weights = FakeServer(DiceModel()), load_file(model / "model.safetensors")
    pools = {"policy": {"urls": [server.url], "device": "cpu"}}
    engine = engine_for([], model, tmp_path, pools=pools, transport=transport, verify=True, bucket_mb=1)
    try:
        push(engine, weights, 0)
        assert engine.metrics()["sync/verified"] == 1
        assert any("qkv_proj" in name for name in weights) is False, "the server joins what the policy sends apart"
        take = server._take
        server._take = lambda tensors: take({n: t + (n == "model.norm.weight") * 1e-3 for n, t in tensors.items()})  # type: ignore[method-assign]
        with pytest.raises(RolloutFailed, match=r"differ in 1 tensors, model\.norm\.weight among them"):
            push(engine, weights, 1)
        server.refusing = {"/weights_checker"}
        with pytest.raises(RolloutFailed, match="gave no checksums"):
            push(engine, weights, 2)
    finally:
        engine.close()
        server.stop()


def test_parts_of_a_joined_tensor_may_come_in_any_order_and_bucket() -> None:
    q, k, v = (torch.full((2, 3), float(i)) for i in range(3))
    name = "model.layers.0.self_attn.{}_proj.weight"
    one, apart = Checksums(), Checksums()
    one.add(make_bucket([(name.format("q"), q), (name.format("k"), k), (name.format("v"), v)]))
    for part, tensor in (("v", v), ("q", q), ("k", k)):
        apart.add(make_bucket([(name.format(part), tensor)]))
    assert one.expected == apart.expected
    assert set(one.expected) == {"model.layers.0.self_attn.qkv_proj.weight"}
    swapped = Checksums()
    swapped.add(make_bucket([(name.format("q"), k), (name.format("k"), q), (name.format("v"), v)]))
    (held,) = swapped.expected["model.layers.0.self_attn.qkv_proj.weight"]
    assert one.wrong({"model.layers.0.self_attn.qkv_proj.weight": held}) == list(one.expected)


def test_a_server_that_shares_no_name_is_wrong_and_an_answer_without_checksums_is_an_error() -> None:
    sent = Checksums()
    sent.add(make_bucket([("a", torch.zeros(2))]))
    assert sent.wrong({"b": "0"}) == ["b"]
    for answer in (None, {}, {"ranks": []}, {"ranks": [{"checksums": {}}]}):
        with pytest.raises(ValueError, match="named no checksums"):
            read_checksums(answer)
