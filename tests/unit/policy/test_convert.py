"""Conversion: bits and types back, Megatron's own names and shapes, checkpoints that Megatron itself reads."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, write_family
from training import train
from typer.testing import CliRunner

from megatron_urlvr.cli import app
from megatron_urlvr.config.model import ModelSection
from megatron_urlvr.config.optim import OptimSection
from megatron_urlvr.config.parallel import ParallelSection
from megatron_urlvr.exit_codes import UnusableInput
from megatron_urlvr.policy import checkpoint
from megatron_urlvr.policy.convert import places, to_hf, to_megatron
from megatron_urlvr.policy.hf.folder import INDEX, SINGLE, read_config, write_folder
from megatron_urlvr.policy.policy import Policy

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("convert")
    return {name: write_family(root / name, name, tied=name == "qwen3") for name in FAMILIES}


def tensors_of(folder: Path) -> Tensors:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key


def policy_of(folder: Path, layout, **kwargs) -> Policy:
    return Policy(ModelSection(path=str(folder)), ParallelSection(), layout, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back_in_shards_gives_every_bit_and_type(written, tmp_path: Path, name: str, dtype: torch.dtype):
    tensors = {key: tensor.to(dtype) for key, tensor in tensors_of(written[name]).items()}
    config = read_config(written[name])
    write_folder(tmp_path / "in", tensors.items(), config=config, tokenizer_from=written[name], max_shard_bytes=9000)
    to_megatron(tmp_path / "in", tmp_path / "megatron")
    to_hf(tmp_path / "megatron", tmp_path / "out", model=tmp_path / "megatron", max_shard_bytes=7000)
    assert_same(tensors_of(tmp_path / "out"), tensors)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for key, file in index["weight_map"].items():
        assert key in load_file(tmp_path / "out" / file)
    assert read_config(tmp_path / "out") == config
    assert (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize("name", FAMILIES)
def test_keys_and_shapes_are_those_that_megatron_gives_this_model(written, layout, name: str):
    theirs = {}
    for entry in policy_of(written[name], layout).chunks[0].sharded_state_dict().values():
        built = entry.build() if isinstance(entry, ShardedTensorFactory) else entry
        for each in built if isinstance(built, list) else [built]:
            if isinstance(each, ShardedTensor):
                theirs[each.key] = tuple(each.global_shape)
    ours = {place.key: (*place.stacked, *place.shape) for place in places(read_config(written[name]), "folder")}
    assert ours == theirs


@pytest.mark.parametrize("name", FAMILIES)
def test_megatron_reads_what_was_converted(written, layout, tmp_path: Path, name: str):
    to_megatron(written[name], tmp_path / "megatron")
    policy = policy_of(written[name], layout, load_weights=False)
    wanted = {
        key: entry
        for key, entry in policy.chunks[0].sharded_state_dict().items()
        if isinstance(entry, ShardedTensor | ShardedTensorFactory)
    }
    policy.chunks[0].load_state_dict(dist_checkpointing.load(wanted, str(tmp_path / "megatron")), strict=False)
    assert_same(dict(policy.export()), tensors_of(written[name]))


def test_a_runs_checkpoint_becomes_a_folder_with_the_weights_of_its_step(written, layout, tmp_path: Path):
    policy = policy_of(written["qwen2"], layout, optim=OptimSection(lr=1e-2, ema_decay=0.9))
    train(policy, 2)
    path = checkpoint.save(policy, tmp_path, 2, {"step": 2}, keep=1)
    done = CliRunner().invoke(app, ["convert", str(path), str(tmp_path / "hf"), "--model", str(written["qwen2"])])
    assert done.exit_code == 0, done.output
    assert_same(tensors_of(tmp_path / "hf"), dict(policy.export()))


# -- what cannot be converted -----------------------------------------------------------------------------------------


def changed(source: Path, target: Path, change) -> Path:
    tensors = tensors_of(source)
    change(tensors)
    target.mkdir()
    (target / "config.json").write_text((source / "config.json").read_text())
    save_file(tensors, target / SINGLE)
    return target


KEY = "model.layers.1.self_attn.k_norm.weight"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda tensors: tensors.pop(KEY), f"tensor {KEY} is missing"),
        (lambda tensors: tensors.update({KEY: torch.ones(3)}), rf"{KEY} has shape \(3,\), expected \(16,\)"),
        (lambda tensors: tensors.update({"score.weight": torch.ones(3)}), r"unexpected tensor score\.weight"),
        (lambda tensors: tensors.update({KEY: torch.ones(16).half()}), f"tensor {KEY} is float16, but"),
        (
            lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.weight": torch.ones(48, 32).half()}),
            "differ in type",
        ),
    ],
)
def test_a_folder_that_is_not_its_config_is_refused_by_the_tensors_name(written, tmp_path, change, sentence: str):
    folder = changed(written["qwen3"], tmp_path / "changed", change)
    with pytest.raises(UnusableInput, match=sentence):
        to_megatron(folder, tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()


def test_a_checkpoint_of_another_model_is_refused_by_the_tensors_name(written, tmp_path: Path):
    to_megatron(written["qwen2"], tmp_path / "qwen2", vocab_multiple=1)
    with pytest.raises(UnusableInput, match=r"q_layernorm\.weight, of which .*q_norm\.weight is made, is missing"):
        to_hf(tmp_path / "qwen2", tmp_path / "out", model=written["qwen3"])
    with pytest.raises(UnusableInput, match=r"unexpected tensor decoder\.layers\.self_attention\.linear_qkv\.bias"):
        to_hf(tmp_path / "qwen2", tmp_path / "out", model=changed_config(written["qwen2"], tmp_path / "llama"))
    wider = changed_config(written["qwen2"], tmp_path / "wider", architectures=["Qwen2ForCausalLM"], hidden_size=64)
    with pytest.raises(UnusableInput, match=r"has shape \(29, 32\), expected \(29, 64\)"):
        to_hf(tmp_path / "qwen2", tmp_path / "out", model=wider)
    assert not (tmp_path / "out").exists()


def changed_config(source: Path, target: Path, **change) -> Path:
    target.mkdir()
    config = {**read_config(source), "architectures": ["LlamaForCausalLM"], **change}
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_nothing_is_written_over(written, tmp_path: Path):
    (tmp_path / "there").mkdir()
    with pytest.raises(UnusableInput, match="is there already"):
        to_megatron(written["qwen2"], tmp_path / "there")


def test_an_index_that_would_run_code_is_not_read(written, tmp_path: Path):
    to_megatron(written["qwen2"], tmp_path / "megatron")
    (tmp_path / "megatron" / ".metadata").write_bytes(b"cos\nmkdir\n(S'/tmp/never'\ntR.")
    with pytest.raises(UnusableInput, match=r"names os\.mkdir"):
        to_hf(tmp_path / "megatron", tmp_path / "out", model=written["qwen2"])


# -- files and folders that are damaged, and places where nothing can be written ---------------------------------------


def edited(**changes):
    """A change of config.json."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def holding(name: str, content: bytes):
    """A change that puts `content` in a file."""
    return lambda folder: (folder / name).write_bytes(content)


def cut(folder: Path) -> None:
    file = folder / "model-00002-of-00005.safetensors"
    os.truncate(file, file.stat().st_size - 1)


def broken_header(folder: Path) -> None:
    file = folder / "model-00002-of-00005.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:8] + b"#" + data[9:])


def swapped(folder: Path) -> None:
    shutil.copy(folder / "model-00001-of-00005.safetensors", folder / "model-00002-of-00005.safetensors")


DAMAGE = {
    "not UTF-8": (holding("config.json", b'{"a": "\xff"}'), r"config\.json: not UTF-8 text"),
    "no object": (holding("config.json", b'"x"'), r"config\.json: holds a str, an object is expected"),
    "too deep": (holding("config.json", b"[" * 100_000), r"config\.json: not valid JSON"),
    "no list": (edited(architectures=5), "architecture 5 is not supported; supported: Qwen2ForCausalLM"),
    "no heads": (edited(num_attention_heads=0), "num_attention_heads = 0; a whole number above 0 is expected"),
    "text": (edited(head_dim="8"), "head_dim = '8'; a whole number above 0 is expected"),
    "uneven heads": (edited(num_key_value_heads=3), "num_key_value_heads = 3; a divisor of num_attention_heads = 4 is"),
    "neither": (edited(tie_word_embeddings="no"), "tie_word_embeddings = 'no'; true or false is expected"),
    "no rope": (edited(rope_parameters=5), "rope_parameters = 5; an object is expected"),
    "no theta": (edited(rope_parameters={"rope_theta": "x"}), "rope_theta = 'x'; a number above 0 is expected"),
    "cut short": (cut, r"model-00002-of-00005\.safetensors: cannot be read .*; copy the folder again"),
    "header": (broken_header, r"model-00002-of-00005\.safetensors: cannot be read .*; copy the folder again"),
    "another file": (swapped, r"model-00002-of-00005\.safetensors: it holds no tensor .*; copy the folder again"),
    "file gone": (
        lambda folder: (folder / "model-00002-of-00005.safetensors").unlink(),
        r"index\.json: it names model-00002-of-00005\.safetensors \(and 0 more\), which is not there; copy the folder",
    ),
    "broken index": (holding(INDEX, b"{"), r"index\.json: not valid JSON"),
    "empty index": (holding(INDEX, b"{}"), r"index\.json: its weight_map does not say which file"),
    "numbers": (holding(INDEX, b'{"weight_map": {"a": 1}}'), r"index\.json: its weight_map does not say which file"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_folder_is_refused_by_the_files_name_and_nothing_is_left(written, tmp_path: Path, what: str):
    damage, sentence = DAMAGE[what]
    config, tensors = read_config(written["qwen2"]), tensors_of(written["qwen2"])
    write_folder(tmp_path / "in", tensors.items(), config=config, tokenizer_from=None, max_shard_bytes=17_000)
    damage(tmp_path / "in")
    with pytest.raises(UnusableInput, match=sentence):
        to_megatron(tmp_path / "in", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("place", ["/proc/x", "/proc/x/y", "file/x", "/", ".", "n" * 300])
def test_a_place_where_nothing_can_be_written_is_named(written, tmp_path: Path, monkeypatch, place: str):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UnusableInput, match=f"^{re.escape(str(Path(place)))} (cannot be written: |is there already)"):
        to_megatron(written["qwen2"], Path(place))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_type_that_is_not_converted_is_named(written, tmp_path: Path):
    key = "model.norm.weight"
    folder = changed(written["qwen2"], tmp_path / "in", lambda tensors: tensors.update({key: torch.ones(32).char()}))
    with pytest.raises(UnusableInput, match=f"tensor {key} is I8; supported: F32, F16, BF16, F64"):
        to_megatron(folder, tmp_path / "out")
