"""Every family against transformers: the same log-probs, gradients that reach every tensor, tensors back to the bit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import FAMILIES, hf_model, oracle_stats, random_rows, write_family

from megatron_urlvr.algorithms.losses import LossInputs
from megatron_urlvr.config.model import ModelSection
from megatron_urlvr.config.optim import OptimSection
from megatron_urlvr.config.parallel import ParallelSection
from megatron_urlvr.exit_codes import UnusableInput
from megatron_urlvr.policy.hf.families import family_of, rope_frequencies
from megatron_urlvr.policy.hf.folder import SINGLE, read_config
from megatron_urlvr.policy.policy import Policy
from megatron_urlvr.types import TokenStats

TOLERANCE = 1e-4
"""Nats, float32 against transformers in float64."""


@pytest.fixture(scope="module")
def family_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: write_family(root / name, name) for name in FAMILIES}


def policy_of(folder: Path, layout, **kwargs) -> Policy:
    return Policy(ModelSection(path=str(folder)), ParallelSection(max_tokens_per_microbatch=40), layout, **kwargs)


@pytest.mark.parametrize("name", FAMILIES)
def test_log_probs_are_transformers_own(name: str, family_folders, layout):
    rows = random_rows(6, vocab=29, longest=60)
    found = policy_of(family_folders[name], layout).score(rows, frozenset({"logp"}))
    model = hf_model(family_folders[name])
    for row, stats in zip(rows, found, strict=True):
        expected = oracle_stats(model, row)["logp"]
        assert (stats.get("logp").double() - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_exported_is_what_the_folder_held(name: str, family_folders, layout):
    held = load_file(family_folders[name] / SINGLE)
    exported = dict(policy_of(family_folders[name], layout).export())
    assert exported.keys() == held.keys()
    assert all(torch.equal(tensor, held[key]) for key, tensor in exported.items())


class Likelihood:
    needs = frozenset({"logp"})

    def upstream(self, inputs: LossInputs) -> None:
        return None

    def __call__(self, stats: TokenStats, inputs: LossInputs):
        return -(stats.get("logp") * inputs.weight).sum(), {}

    def finish(self, sums):
        return dict(sums)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_update_moves_every_tensor_and_makes_the_rows_likelier(name: str, family_folders, layout):
    policy = policy_of(family_folders[name], layout, optim=OptimSection(lr=1e-3))
    rows = random_rows(6, vocab=29)
    for row in rows:
        row.weight = torch.full((len(row.response),), 0.05)
    before = {key: tensor.clone() for key, tensor in policy.export()}
    first = policy.update(rows, Likelihood(), lr=1e-3)["train/loss"]
    still = [key for key, tensor in policy.export() if torch.equal(tensor, before[key])]
    assert not still
    assert policy.update(rows, Likelihood(), lr=1e-3)["train/loss"] < first


def test_llama3_frequencies_are_transformers_own(family_folders):
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    folder = family_folders["llama3"]
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](AutoConfig.from_pretrained(folder), torch.device("cpu"))
    plain = rope_frequencies({**read_config(folder), "rope_parameters": {"rope_theta": 500.0}}, 8)
    found = rope_frequencies(read_config(folder), 8)
    assert torch.allclose(found, expected, rtol=1e-6, atol=0)
    share = found / plain
    assert share[0] == 1  # short wavelengths are left alone
    assert share[-1] == pytest.approx(1 / 8)  # long ones are stretched by the factor
    assert any(1 / 8 < float(x) < 1 for x in share)  # and some are blended


def test_hub_configs_of_released_models_name_the_scaling_where_older_transformers_put_it():
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    old = {"rope_theta": 500000.0, "rope_scaling": {**scaling, "original_max_position_embeddings": 8192}}
    found = rope_frequencies(old, 128)
    assert float(found[0]) == 1.0
    assert float(found[-1]) == pytest.approx(500000.0 ** (-126 / 128) / 8, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("llama2", {"attention_bias": True}, "attention_bias = true is not supported; supported: false"),
        ("llama2", {"mlp_bias": True}, "mlp_bias = true is not supported"),
        ("llama3", {"rope_parameters": {"rope_type": "llama3", "factor": 8}}, "'llama3' without high_freq_factor"),
        ("llama3", {"rope_parameters": {"rope_type": "yarn"}}, "rope type 'yarn'; supported: default, llama3"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2 is not supported; supported: 1"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\] is not supported; supported: \[\]"),
        ("qwen3_moe", {"num_experts": None, "num_local_experts": None}, "does not say num_experts"),
    ],
)
def test_variants_of_a_family_that_are_not_built_are_refused(name: str, change, sentence: str, family_folders):
    with pytest.raises(UnusableInput, match=sentence):
        family_of({**read_config(family_folders[name]), **change}, "folder")
