"""Hugging Face tensors to Megatron's and back: where every row of every tensor goes, at any tensor-parallel size."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import write_qwen2

from megatron_urlvr.exit_codes import UnusableInput
from megatron_urlvr.policy.hf.families import QWEN2, QWEN3_MOE, family_of, rope_theta, rules_for, shape_of
from megatron_urlvr.policy.hf.folder import INDEX, SINGLE, TensorFolder, read_config, write_folder
from megatron_urlvr.policy.hf.rules import Rule, expected_shape, join_shards, take_shard

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 29,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
    "num_experts": 3,
    "moe_intermediate_size": 8,
}
RULES = (*QWEN2.first, *QWEN2.layer, *QWEN2.last, QWEN2.head, *QWEN3_MOE.layer[-5:])


def hf_parts(rule: Rule, tp: int) -> list[torch.Tensor]:
    """The rule's Hugging Face tensors, every entry different."""
    shape = shape_of(CONFIG, tp=tp)
    parts = []
    for i, name in enumerate(rule.hf):
        size = expected_shape(name, shape)
        parts.append(10_000.0 * i + torch.arange(torch.Size(size).numel(), dtype=torch.float32).view(size))
    return parts


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.megatron.removeprefix("decoder.layers.{l}."))
def test_merging_sharding_joining_and_splitting_gives_the_tensors_back(rule: Rule, tp: int):
    shape = shape_of(CONFIG, tp=tp)
    parts = hf_parts(rule, tp)
    whole = rule.merge(parts, shape)
    shards = [take_shard(whole, rule.shard, rank, tp) for rank in range(tp)]
    assert len({tuple(shard.shape) for shard in shards}) == 1
    assert sum(shard.numel() for shard in shards) == whole.numel() * (tp if rule.shard == "replicated" else 1)
    back = rule.split(join_shards(shards, rule.shard), shape)
    for part, found in zip(parts, back, strict=True):
        assert torch.equal(part, found)


def rule_of(name: str) -> Rule:
    return next(rule for rule in RULES if rule.megatron.endswith(name))


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", ["linear_qkv.weight", "linear_qkv.bias"])
def test_each_rank_holds_whole_key_value_groups_queries_first(name: str, tp: int):
    """Megatron's ParallelAttention reads its shard as groups of [queries of the group, key, value]."""
    rule, shape = rule_of(name), shape_of(CONFIG, tp=tp)
    q, k, v = hf_parts(rule, tp)
    d, per_group, groups = shape.head_dim, shape.heads // shape.kv_heads, shape.kv_heads // tp
    for rank in range(tp):
        shard = take_shard(rule.merge([q, k, v], shape), rule.shard, rank, tp)
        rows = iter(shard.split(d))
        for group in range(rank * groups, (rank + 1) * groups):
            for head in range(group * per_group, (group + 1) * per_group):
                assert torch.equal(next(rows), q[head * d : (head + 1) * d])
            assert torch.equal(next(rows), k[group * d : (group + 1) * d])
            assert torch.equal(next(rows), v[group * d : (group + 1) * d])
        assert next(rows, None) is None


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_each_rank_holds_the_same_channels_of_gate_and_up(tp: int):
    rule = rule_of("linear_fc1.weight")
    gate, up = hf_parts(rule, tp)
    width = CONFIG["intermediate_size"] // tp
    for rank in range(tp):
        shard = take_shard(rule.merge([gate, up], shape_of(CONFIG, tp=tp)), rule.shard, rank, tp)
        mine = slice(rank * width, (rank + 1) * width)
        assert torch.equal(shard, torch.cat([gate[mine], up[mine]]))


@pytest.mark.parametrize(("tp", "padded"), [(1, 29), (2, 30), (4, 32)])
def test_the_vocabulary_is_padded_with_zeros_and_cut_again(tp: int, padded: int):
    rule, shape = QWEN2.head, shape_of(CONFIG, tp=tp)
    assert shape.padded_vocab == padded
    (table,) = hf_parts(rule, tp)
    whole = rule.merge([table], shape)
    assert whole.shape == (padded, 16)
    assert torch.count_nonzero(whole[29:]) == 0
    assert torch.equal(rule.split(whole, shape)[0], table)


def test_a_tied_model_has_no_table_of_its_own_for_the_head():
    names = [rule.megatron for rule, _ in rules_for(QWEN2, 2, tied=True)]
    assert "output_layer.weight" not in names
    assert len(names) + 1 == len(rules_for(QWEN2, 2, tied=False))


# -- configs that cannot be used --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "'MambaForCausalLM' is not supported; supported: Qwen2ForCausalLM"),
        ({"architectures": None}, r"'\(none\)' is not supported"),
        ({"hidden_act": "gelu"}, 'hidden_act = "gelu" is not supported; supported: "silu"'),
        ({"use_sliding_window": True}, "use_sliding_window = true is not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope type 'yarn'; supported: default"),
    ],
)
def test_a_config_of_another_kind_is_refused(change: dict, sentence: str):
    with pytest.raises(UnusableInput, match=sentence):
        family_of({**CONFIG, **change}, "folder")


def test_the_rotary_base_is_found_where_either_transformers_version_writes_it():
    assert rope_theta({"rope_theta": 5e5}) == 5e5
    assert rope_theta({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}) == 1e6
    assert rope_theta({}) == 1e4


# -- folders ----------------------------------------------------------------------------------------------------------


def changed_copy(source: Path, target: Path, change) -> Path:
    tensors = load_file(source / SINGLE)
    change(tensors)
    target.mkdir()
    (target / "config.json").write_text((source / "config.json").read_text())
    save_file(tensors, target / SINGLE, metadata={"format": "pt"})
    return target


def load(folder: Path, layout):
    from megatron_urlvr.config.model import ModelSection
    from megatron_urlvr.config.parallel import ParallelSection
    from megatron_urlvr.policy.policy import Policy

    return Policy(ModelSection(path=str(folder)), ParallelSection(), layout)


@pytest.mark.parametrize("name", ["untied", "tied", "full", "single"])
def test_what_is_exported_is_what_the_folder_held(make_policy, folders, name: str):
    held = load_file(folders[name] / SINGLE)
    exported = list(make_policy(name).export())
    assert len(exported) == len(held)
    for key, tensor in exported:
        assert torch.equal(tensor, held[key]), key


def test_a_saved_folder_is_read_by_transformers_and_by_the_policy(make_policy, folders, layout, tmp_path: Path):
    from tiny_models import hf_model

    make_policy("tied").save_hf(tmp_path / "saved")
    again = dict(load(tmp_path / "saved", layout).export())
    theirs = hf_model(tmp_path / "saved", torch.float32).state_dict()
    for key, tensor in load_file(folders["tied"] / SINGLE).items():
        assert torch.equal(again[key], tensor)
        assert torch.equal(theirs[key], tensor)
    assert (tmp_path / "saved" / "tokenizer.json").exists()


def test_a_large_folder_is_written_in_shards_that_its_index_names(make_policy, folders, tmp_path: Path):
    tensors = load_file(folders["untied"] / SINGLE)
    config = read_config(folders["untied"])
    write_folder(tmp_path / "m", tensors.items(), config=config, tokenizer_from=None, max_shard_bytes=9000)
    index = json.loads((tmp_path / "m" / INDEX).read_text())
    files = sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in tensors.values())
    assert all((tmp_path / "m" / name).stat().st_size < 9000 + 8192 for name in files)
    source = TensorFolder(tmp_path / "m")
    assert all(torch.equal(source.read(key, tuple(t.shape)), t) for key, t in tensors.items())


def test_a_missing_a_misshapen_and_an_unexpected_tensor_are_named(folders, layout, tmp_path: Path):
    key = "model.layers.1.mlp.up_proj.weight"
    missing = changed_copy(folders["untied"], tmp_path / "a", lambda tensors: tensors.pop(key))
    with pytest.raises(UnusableInput, match=f"tensor {key} is missing"):
        load(missing, layout)
    bent = changed_copy(folders["untied"], tmp_path / "b", lambda tensors: tensors.update({key: torch.zeros(2, 32)}))
    with pytest.raises(UnusableInput, match=rf"{key} has shape \(2, 32\), expected \(48, 32\)"):
        load(bent, layout)
    extra = changed_copy(folders["untied"], tmp_path / "c", lambda tensors: tensors.update({"score.w": torch.ones(1)}))
    with pytest.raises(UnusableInput, match=r"unexpected tensor score\.w"):
        load(extra, layout)


def test_a_folder_without_readable_weights_is_refused(folders, layout, tmp_path: Path):
    with pytest.raises(UnusableInput, match="no such folder"):
        load(tmp_path / "nowhere", layout)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnusableInput, match=r"holds no config\.json"):
        load(tmp_path / "empty", layout)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((folders["untied"] / "config.json").read_text())
    with pytest.raises(UnusableInput, match="only safetensors are read"):
        load(bare, layout)
    whole = (folders["untied"] / SINGLE).read_bytes()
    (bare / SINGLE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnusableInput, match="cannot be read"):
        load(bare, layout)


def test_a_stored_head_of_a_tied_model_is_passed_over(folders, layout, tmp_path: Path):
    folder = write_qwen2(tmp_path / "t", tied=True)
    doubled = changed_copy(
        folder, tmp_path / "d", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    )
    assert "lm_head.weight" not in dict(load(doubled, layout).export())
