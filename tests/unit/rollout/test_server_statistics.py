"""Token statistics of servers: the plug-in on their path, the sentence when it is absent, what cannot be used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_models import DiceModel
from fake_sglang import FakeServer
from server_contract import engine_for, prompts, push

from megatron_urlvr.config.checks import check
from megatron_urlvr.config.errors import ConfigError
from megatron_urlvr.config.loader import load_config
from megatron_urlvr.exit_codes import UnusableInput
from megatron_urlvr.rollout.plugin import plugin_environment
from megatron_urlvr.rollout.supervisor import server_statistics
from megatron_urlvr.types import Sampling

QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart_sglang.yaml"
ENTROPY = 'reward.terms.main={"name": "token_entropy", "aggregation": "mean"}'


def test_a_server_finds_the_plug_in_without_an_installation(tmp_path: Path) -> None:
    variables = plugin_environment(tmp_path, ["entropy", "logp", "self_certainty"], {})
    assert variables["URLVR_TOKEN_STATS"] == "entropy,self_certainty"
    assert plugin_environment(tmp_path, ["entropy"], {"PYTHONPATH": "x"})["PYTHONPATH"].endswith(":x")
    # As SGLang looks for it: by entry point, in a Python that has nothing else (-S leaves out site-packages).
    code = (
        "from importlib.metadata import entry_points; (p,) = entry_points(group='sglang.srt.plugins');"
        "import importlib.util; print(p.value, importlib.util.find_spec('urlvr_kernels').origin)"
    )
    found = subprocess.run(
        [sys.executable, "-S", "-c", code], env=variables, capture_output=True, text=True, check=True
    )
    value, origin = found.stdout.split()
    assert value == "urlvr_kernels.sglang_plugin:register"
    assert Path(origin).parent.parent == tmp_path


def test_nothing_is_put_on_the_path_when_no_statistic_is_wanted(tmp_path: Path) -> None:
    assert plugin_environment(tmp_path / "none", ["logp"], {"PYTHONPATH": "x"}) == {}
    assert not (tmp_path / "none").exists()


def test_a_server_without_the_plug_in_ends_the_run_before_step_0(tmp_path: Path) -> None:
    server = FakeServer(DiceModel())
    try:
        engine = engine_for([server.url], _folder(tmp_path), tmp_path, transport="disk", statistics=("entropy",))
        try:
            with pytest.raises(UnusableInput, match=r"gives no entropy with its tokens.*URLVR_TOKEN_STATS=entropy"):
                push(engine, {"w": torch.zeros(1)}, 0)
        finally:
            engine.close()
    finally:
        server.stop()


def test_statistics_of_servers_arrive_with_the_samples(tmp_path: Path) -> None:
    server = FakeServer(DiceModel(), statistics=("entropy", "self_certainty"))
    try:
        engine = engine_for(
            [server.url], _folder(tmp_path), tmp_path, transport="disk", statistics=("entropy", "self_certainty")
        )
        try:
            push(engine, {"w": torch.zeros(1)}, 0)
            for group in engine.generate(prompts(2), Sampling(3, 8)):
                for sample in group:
                    assert sample.stats is not None
                    assert sample.stats.present() == {"logp", "entropy", "self_certainty"}
                    assert len(sample.stats.get("entropy")) == sample.length
        finally:
            engine.close()
    finally:
        server.stop()


def _folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["rollout.engine=embedded"], "reward.statistics = 'servers' with rollout.engine = 'embedded'"),
        (["reward.judge=reference"], "servers measure with the weights they sample with"),
        (["reward.temperature=0.5"], "servers measure at the temperature they sample at, 1.0"),
    ],
)
def test_statistics_that_would_not_match_are_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence.replace("(", r"\(")):
        load_config(QUICKSTART, ["reward.statistics=servers", ENTROPY, *overrides])


def test_the_statistics_are_those_that_the_rewards_need(tmp_path: Path) -> None:
    assert server_statistics(load_config(QUICKSTART, [ENTROPY])) == ()
    config = load_config(QUICKSTART, [ENTROPY, "reward.statistics=servers"])
    assert server_statistics(config) == ("entropy",)
    (tmp_path / "config.json").write_text('{"vocab_size": 30}')
    config.servers.pools["policy"].model = str(tmp_path)
    known: dict[str, Any] = {"world_size": 1, "tokenizer_size": 20, "device": "cpu"}
    (problem,) = check(config, hf_config={"vocab_size": 21}, **known)
    assert "has a vocabulary of 30" in problem
    assert check(config, hf_config={"vocab_size": 30}, **known) == []
