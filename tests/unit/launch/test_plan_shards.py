"""A plan's bytes are those that a real policy of the same shape allocates; its parameters those that were published."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import write_family, write_qwen2

from megatron_urlvr.config.model import ModelSection
from megatron_urlvr.config.optim import OptimSection
from megatron_urlvr.config.parallel import ParallelSection
from megatron_urlvr.distributed.layout import joined
from megatron_urlvr.launch.plan.shards import (
    PlannedPolicy,
    Shard,
    build_shards,
    estimated_shards,
    kinds_of_stages,
    layers_of_stages,
    storage_bytes,
)
from megatron_urlvr.policy.hf.families import family_of
from megatron_urlvr.policy.hf.folder import read_config
from megatron_urlvr.policy.policy import Policy

MODELS = Path(__file__).parents[3] / "configs" / "recipes" / "models"
OPTIM = OptimSection(lr=1e-3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    dense = {name: write_qwen2(root / name, tied=name == "tied", layers=4) for name in ("tied", "untied")}
    return dense | {"experts": write_family(root / "experts", "qwen3_moe", layers=4)}


def policy_of(
    folder: Path, dtype: torch.dtype = torch.float32, dp: int = 1, layers: int | None = None, **parallel: object
) -> PlannedPolicy:
    hf = read_config(folder)
    hf = hf if layers is None else {**hf, "num_hidden_layers": layers}
    return PlannedPolicy(
        hf, family_of(hf, str(folder)), ParallelSection.model_validate(parallel), dp, dtype, "none", OPTIM
    )


def planned(folder: Path, dtype: torch.dtype = torch.float32, dp: int = 1, **parallel: object) -> list[Shard]:
    return build_shards(policy_of(folder, dtype, dp, **parallel))


def allocated(folder: Path, dtype: str, *, distributed: bool) -> tuple[int, int, int]:
    """Bytes of weights, gradients, and optimizer of a real policy that has taken a step."""
    parallel = ParallelSection(distributed_optimizer=distributed)
    with joined(parallel) as layout:
        policy = Policy(ModelSection(path=str(folder), dtype=dtype), parallel, layout, optim=OPTIM)
        parameters = list(policy.parameters.values())
        assert policy.optimizer is not None
        policy.optimizer.step(1e-3)
        state = []
        for part in policy.optimizer.parts:
            for group in part.optimizer.param_groups:
                for master in group["params"]:
                    state += [master, *(x for x in part.optimizer.state[master].values() if x.numel() > 1)]
        weights = [parameter.data for parameter in parameters]
        gradients = [parameter.main_grad for parameter in parameters]
        return storage_bytes(weights), storage_bytes(gradients), storage_bytes(state, besides=weights)


@pytest.mark.parametrize("distributed", [False, True], ids=["plain optimizer", "distributed optimizer"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["tied", "untied", "experts"])
def test_weights_gradients_and_optimizer_take_the_bytes_that_a_real_policy_allocates(folders, name, dtype, distributed):
    real = allocated(folders[name], dtype, distributed=distributed)
    (shard,) = planned(folders[name], getattr(torch, dtype), distributed_optimizer=distributed)
    assert (shard.weights, shard.gradients, shard.optimizer) == real


def test_four_data_parallel_ranks_share_the_optimizer_and_nothing_else(folders):
    (alone,) = planned(folders["untied"], torch.bfloat16)
    (shared,) = planned(folders["untied"], torch.bfloat16, dp=4)
    assert shared.parameters == alone.parameters
    assert shared.gradients >= alone.gradients
    # Megatron pads buffers so that every rank's part has one length: a few hundred elements, 12 bytes each.
    assert 0 <= shared.optimizer - alone.optimizer / 4 <= 12 * 1024


def test_context_parallel_ranks_hold_and_share_what_as_many_data_parallel_ones_do(folders):
    assert planned(folders["untied"], torch.bfloat16, dp=2, cp=2) == planned(folders["untied"], torch.bfloat16, dp=4)


def test_experts_are_spread_and_their_optimizer_is_shared_by_the_ranks_that_hold_the_same(folders):
    (alone,) = planned(folders["experts"], torch.bfloat16)
    (spread,) = planned(folders["experts"], torch.bfloat16, dp=2, cp=2, ep=2)
    experts = 4 * 4 * 3 * 32 * 24  # layers, experts, three matrices of hidden x channels
    assert (alone.expert_parameters, spread.expert_parameters) == (experts, experts // 2)
    assert spread.parameters == alone.parameters - experts // 2
    dense = alone.parameters - experts
    shared = 12 * (dense / 4 + experts / 2 / 2)
    assert 0 <= spread.optimizer - shared <= 12 * 1024


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_pipeline_stages_together_hold_the_model_and_a_copy_of_a_tied_table(folders, name):
    (whole,) = planned(folders[name])
    stages = planned(folders[name], pp=4)
    assert [shard.pp_ranks for shard in stages] == [(0,), (1, 2), (3,)]
    held = sum(shard.parameters * len(shard.pp_ranks) for shard in stages)
    assert held == whole.parameters + (29 * 32 if name == "tied" else 0)


def test_interleaved_and_uneven_stages_hold_the_layers_that_the_config_says(folders):
    interleaved = planned(folders["untied"], pp=2, vpp=2)
    assert [shard.layers for shard in interleaved] == [2, 2]
    uneven = planned(folders["untied"], pp=2, stage_layers=[1, 3])
    assert [shard.layers for shard in uneven] == [1, 3]
    both = policy_of(folders["untied"], layers=10, pp=2, vpp=2, stage_layers=[3, 2, 4, 1])
    assert layers_of_stages(both.parallel, 10) == [7, 3]
    assert kinds_of_stages(both.parallel, 10) == [(0,), (1,)]
    stages = [tensor.stage for tensor in both.stream.tensors if "input_layernorm" in tensor.name]
    assert stages == [0, 0, 0, 1, 1, 0, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ("experts", "layout"),
    [
        (False, {"tp": 2, "sequence_parallel": True}),
        (False, {"tp": 2, "pp": 2, "cp": 2}),
        (False, {"pp": 4}),
        (True, {"ep": 4, "cp": 2}),
        (True, {"tp": 2, "sequence_parallel": True, "pp": 2, "ep": 2}),
    ],
)
def test_a_search_estimates_what_building_counts_up_to_padding(tmp_path, folders, experts, layout):
    folder = folders["experts"] if experts else tmp_path / "even"
    if not experts:
        write_qwen2(folder, vocab_size=128, layers=4, tokenizer=False)
    built = planned(folder, torch.bfloat16, dp=2, **layout)
    estimated = estimated_shards(policy_of(folder, torch.bfloat16, dp=2, **layout))
    for one, other in zip(built, estimated, strict=True):
        padding = 32 // layout.get("tp", 1) if experts else 0  # 29 entries of a table to an even number
        assert (one.pp_ranks, one.layers) == (other.pp_ranks, other.layers)
        assert one.expert_parameters == other.expert_parameters
        assert 0 <= one.parameters - other.parameters <= padding
        assert 0 <= one.total - other.total <= 18 * 4096


PUBLISHED = {
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-Math-7B": 7_615_616_512,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
    "Llama-3.1-70B": 70_553_706_496,
    "Qwen3-1.7B-Base": 1_720_574_976,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-Math-1.5B": 1_543_714_304,
    "Qwen3-4B-Base": 4_022_468_096,
    "Qwen3-8B-Base": 8_190_735_360,
    "Llama-3.1-8B": 8_030_261_248,
    "Qwen3-30B-A3B": 30_532_122_624,
}
"""Parameters in the safetensors of the Hugging Face repositories; Qwen3-1.7B without the copy of its tied table."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_models_of_the_recipes_have_the_published_number_of_parameters(name):
    assert policy_of(MODELS / name).stream.numel == PUBLISHED[name]


@pytest.mark.parametrize("name", ["Qwen2.5-7B", "Qwen3-1.7B-Base"])
def test_the_stream_holds_transformers_tensors_by_name_and_size(name):
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        oracle = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(MODELS / name))
    stream = {tensor.name: tensor.numel for tensor in policy_of(MODELS / name).stream.tensors}
    assert stream == {parameter: tensor.numel() for parameter, tensor in oracle.named_parameters()}


@settings(deadline=None, max_examples=15)
@given(experts=st.integers(2, 6), width=st.integers(1, 9), layers=st.integers(1, 3), data=st.data())
def test_a_mixture_counts_all_parameters_and_the_active_ones_as_transformers_does(experts, width, layers, data):
    """A model of as many experts as a token goes to has the active parameters, but for the router's other rows."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    chosen = data.draw(st.integers(1, experts))

    def oracle(experts: int) -> tuple[int, dict[str, object]]:
        config = Qwen3MoeConfig(
            vocab_size=29, hidden_size=8, intermediate_size=16, num_hidden_layers=layers, num_attention_heads=2,
            num_key_value_heads=1, head_dim=4, num_experts=experts, num_experts_per_tok=chosen,
            moe_intermediate_size=width, architectures=["Qwen3MoeForCausalLM"],
        )  # fmt: skip
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        return sum(parameter.numel() for parameter in model.parameters()), config.to_dict()

    total, hf = oracle(experts)
    policy = PlannedPolicy(hf, family_of(hf, "-"), ParallelSection(), 1, torch.float32, "none", None)
    assert policy.stream.numel == total
    active = total - policy.mixture.idle_parameters
    assert active == oracle(chosen)[0] + layers * 8 * (experts - chosen)
