"""The SGLang plug-in: what it hooks, and what it hands to the scheduler."""

from __future__ import annotations

import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from urlvr_kernels import reference, sglang_plugin


@pytest.fixture
def registry(monkeypatch):
    """Stands in for `sglang.srt.plugins.hook_registry`, of which the plug-in uses two names."""
    hooks = []
    module = ModuleType("sglang.srt.plugins.hook_registry")
    module.HookType = SimpleNamespace(BEFORE="before")
    module.HookRegistry = SimpleNamespace(register=lambda *arguments: hooks.append(arguments))
    for name in ("sglang", "sglang.srt", "sglang.srt.plugins"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delenv("URLVR_TOKEN_STATS", raising=False)
    return hooks


def batch(rows: int, vocab: int, info: dict | None = None):
    logits = 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0))
    temperatures = torch.linspace(0.5, 1.5, rows)[:, None]
    output = SimpleNamespace(next_token_logits=logits, customized_info=info)
    return output, SimpleNamespace(temperatures=temperatures, is_all_greedy=False)


def test_it_hooks_the_sampler_and_gives_one_number_per_request(registry):
    sglang_plugin.register()
    ((target, hook, kind),) = registry
    assert (target, kind) == ("sglang.srt.layers.sampler.Sampler.forward", "before")
    output, sampling = batch(5, 1000)
    before = output.next_token_logits.clone()
    assert hook(object(), output, sampling, False, [], [], None) is None
    exact = reference.logits_stats(
        before.double(), None, temperature=sampling.temperatures[:, 0].double(), outputs=("entropy", "self_certainty")
    )
    assert set(output.customized_info) == {"entropy", "self_certainty"}
    for name, column in output.customized_info.items():
        assert len(column) == 5
        values = [column[i] for i in range(5)]
        assert all(type(value) is float for value in values)  # what goes through SGLang's pickles and JSON
        assert values == pytest.approx(getattr(exact, name).tolist(), rel=1e-5)
    assert torch.equal(before, output.next_token_logits)


def test_what_others_put_there_stays(registry):
    output, sampling = batch(2, 50, {"other": [1, 2]})
    sglang_plugin.add_statistics(output, sampling, ("entropy",))
    assert output.customized_info["other"] == [1, 2]
    assert len(output.customized_info["entropy"]) == 2


def test_an_empty_batch_is_left_alone():
    output, sampling = batch(0, 50)
    sglang_plugin.add_statistics(output, sampling, ("entropy",))
    assert output.customized_info is None


def test_masked_logits_have_finite_entropy():
    output, sampling = batch(2, 50)
    output.next_token_logits[0, 10:] = -torch.inf
    sglang_plugin.add_statistics(output, sampling, ("entropy", "self_certainty"))
    assert 0 < output.customized_info["entropy"][0] < torch.tensor(10.0).log()
    assert output.customized_info["self_certainty"][0] == float("inf")


@pytest.mark.parametrize("setting", ["entropy,logp", "", "perplexity"])
def test_unknown_statistics_are_refused(setting, registry, monkeypatch):
    monkeypatch.setenv("URLVR_TOKEN_STATS", setting)
    with pytest.raises(ValueError, match=r"^URLVR_TOKEN_STATS: "):
        sglang_plugin.register()


def test_the_distribution_declares_the_plug_in_and_pins_no_torch():
    project = tomllib.loads((Path(__file__).parents[2] / "kernels" / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == ["torch"]
    ((_, target),) = project["entry-points"]["sglang.srt.plugins"].items()
    module, name = target.split(":")
    assert callable(getattr(import_module(module), name))
