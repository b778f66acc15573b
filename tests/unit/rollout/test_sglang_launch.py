"""The command line that starts a server."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_urlvr.config.loader import load_config
from megatron_urlvr.config.servers import PoolSection
from megatron_urlvr.rollout import supervisor
from megatron_urlvr.rollout.launch_server import Environment, server_command, server_environment

ROOT = Path(__file__).parents[3]
CPU = Environment("/env/bin/python", "cpu", "2.13.0+cpu", "", "")
GPU = Environment("/env/bin/python", "cuda", "2.14.1", "13.0", "2.28.9")


def command(pool: PoolSection, environment: Environment, key_file: Path | None = None) -> str:
    return " ".join(server_command(pool, environment, model="/m", port=31000, key_file=key_file, context=4096))


def test_a_server_on_a_gpu() -> None:
    pool = PoolSection(tp=8, concurrency=512, mem_fraction=0.8, args=["--enable-metrics"])
    assert command(pool, GPU) == (
        "/env/bin/python -m sglang.launch_server --model-path /m --host 127.0.0.1 --port 31000 --tp-size 8"
        " --context-length 4096 --skip-tokenizer-init --dtype auto --mem-fraction-static 0.8 --max-running-requests 512"
        " --base-gpu-id 0 --enable-metrics"
    )


@pytest.mark.parametrize(
    ("trained", "served"), [("auto", "bfloat16"), ("bfloat16", "bfloat16"), ("float32", "float32")]
)
def test_servers_on_gpus_compute_the_policy_in_the_type_that_it_is_trained_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: str, served: str
) -> None:
    """SGLang takes a folder that says float32, as `urlvr pretrain` writes, for float16."""
    monkeypatch.setattr(supervisor, "examine", lambda pool, variables: GPU)
    (tmp_path / "config.json").write_text("{}")
    config = load_config(
        ROOT / "configs" / "quickstart_sglang.yaml",
        [f"model.path={tmp_path}", f"model.dtype={trained}", f"run.dir={tmp_path}", "servers.pools.judge.count=1"],
    )
    assert supervisor.make_plan(config, "policy").dtype == served
    assert supervisor.make_plan(config, "judge").dtype == "auto"
    words = server_command(PoolSection(), GPU, model="/m", port=1, key_file=None, context=64, dtype=served)
    assert words[words.index("--dtype") + 1] == served


def test_a_server_that_shares_its_gpu_with_the_trainer_can_give_memory_back_and_no_other_can() -> None:
    def flags(environment: Environment, colocated: bool) -> list[str]:
        pool, port = PoolSection(mem_fraction=0.4), 31000
        command = server_command(
            pool, environment, model="/m", port=port, key_file=None, context=64, colocated=colocated
        )
        return [word for word in command if word in ("--enable-memory-saver", "0.4")]

    assert flags(GPU, True) == ["0.4", "--enable-memory-saver"]
    assert flags(GPU, False) == ["0.4"]
    assert flags(CPU, True) == []  # SGLang's memory saver is CUDA's: with it a server on a CPU does not start


def test_servers_of_one_host_share_no_gpu() -> None:
    pool = PoolSection(tp=2, count=4)
    commands = [server_command(pool, GPU, model="/m", port=1, key_file=None, context=64, index=k) for k in range(4)]
    assert [each[each.index("--base-gpu-id") + 1] for each in commands] == ["0", "2", "4", "6"]


def test_a_server_on_a_cpu() -> None:
    assert command(PoolSection(context=64, concurrency=32), CPU) == (
        "/env/bin/python -m sglang.launch_server --model-path /m --host 127.0.0.1 --port 31000 --tp-size 1"
        " --context-length 64 --skip-tokenizer-init --device cpu --attention-backend torch_native --dtype float32"
        " --max-total-tokens 2048 --max-running-requests 32 --mem-fraction-static 0.05"
        " --cuda-graph-backend-decode disabled --cuda-graph-backend-prefill disabled"
    )


def test_the_api_key_is_in_no_command_line() -> None:
    assert "--config /tmp/k.yaml" in command(PoolSection(), GPU, Path("/tmp/k.yaml"))


def test_a_server_is_no_part_of_the_training_job() -> None:
    caller = {
        "RANK": "3",
        "WORLD_SIZE": "8",
        "MASTER_ADDR": "a",
        "PYTHONPATH": "x",
        "HOME": "/h",
        "OMP_NUM_THREADS": "2",
    }
    got = server_environment(PoolSection(env={"EXTRA": "1"}), CPU, caller)
    assert got == {
        "HOME": "/h",
        "OMP_NUM_THREADS": "2",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "SGLANG_USE_CPU_ENGINE": "1",
        "EXTRA": "1",
    }
