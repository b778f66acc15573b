"""The activations that a plan counts by hand are those that a real layer keeps for its backward."""

from pathlib import Path

import pytest
import torch
from tiny_models import write_family, write_qwen2

from megatron_urlvr.config.model import ModelSection
from megatron_urlvr.config.optim import OptimSection
from megatron_urlvr.config.parallel import ParallelSection
from megatron_urlvr.distributed.layout import joined
from megatron_urlvr.launch.plan.memory import (
    Load,
    RankMemory,
    kept_per_token,
    layer_activations,
    rank_memory,
)
from megatron_urlvr.launch.plan.shards import PlannedPolicy, estimated_shards
from megatron_urlvr.policy.attention import PackedSequence
from megatron_urlvr.policy.batch import Row
from megatron_urlvr.policy.hf.families import family_of
from megatron_urlvr.policy.hf.folder import read_config
from megatron_urlvr.policy.packing import pack
from megatron_urlvr.policy.policy import Policy

OPTIM = OptimSection(lr=1e-6)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    dense = write_qwen2(root / "dense", tokenizer=False)
    return {"dense": dense, "experts": write_family(root / "experts", "qwen3_moe")}


def kept_by_a_layer(folder: Path, recompute: str) -> tuple[float, PlannedPolicy]:
    """Bytes a token that the layers of a real two-layer policy keep, each on average; and its plan."""
    parallel = ParallelSection(share_prefix=False)
    rows = [Row(tuple(range(10)), [1] * 56) for _ in range(64)]
    with joined(parallel) as layout:
        policy = Policy(ModelSection(path=str(folder), recompute=recompute), parallel, layout)
        chunk = policy.chunks[0]
        batch = pack(rows, range(len(rows)), share_prefix=False)
        tokens = batch.tokens.shape[1]
        weights = {parameter.untyped_storage()._cdata for parameter in chunk.parameters()}
        hidden = torch.randn(tokens, 1, 32, requires_grad=True)
        rotary = chunk.rotary_pos_emb(batch.positions)
        saved: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            saved[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            decoded = hidden
            for layer in chunk.decoder.layers:
                decoded, _ = layer(
                    decoded,
                    attention_mask=None,
                    rotary_pos_emb=rotary,
                    packed_seq_params=PackedSequence.of(batch),
                )
        # Indices are of the batch, not of a layer; they are shared by all.
        kept = [t for where, t in saved.items() if where not in weights and t.is_floating_point()]
        size = sum(tensor.untyped_storage().nbytes() for tensor in kept)
    planned = PlannedPolicy(policy.hf, family_of(policy.hf, "-"), parallel, 1, torch.float32, recompute, None)
    return size / tokens / len(chunk.decoder.layers), planned


ONLY_ON_THE_CPU = {
    "dense": {
        "normalised inputs, which Transformer Engine computes again": 2 * 4 * 32,
        "one over the root mean squares": 2 * 4,
        "attention's output, packed and in its table": 4 * 32,
        "cosines and sines of queries and keys": 4 * 4 * 8,
    },
    "experts": {
        "normalised inputs, which Transformer Engine computes again": 2 * 4 * 32,
        "one over the root mean squares": 2 * 4 + (4 + 2) * 4,
        "attention's output, packed and in its table": 4 * 64,
        "cosines and sines of queries and keys": 4 * 4 * 16,
        "queries and keys, normalised": 4 * (64 + 32),
        "queries, out of the rows that they share with keys and values": 4 * 64,
        "values, in these rows and in attention's table": 4 * 32,
    },
}


@pytest.mark.parametrize("name", ONLY_ON_THE_CPU)
def test_a_layer_keeps_what_is_counted_and_what_only_the_cpu_path_adds(folders, name):
    kept, planned = kept_by_a_layer(folders[name], "none")
    indices = ("router's choices", "where copies come from")  # not floats
    counted = sum(size for what, size in layer_activations(planned).items() if what not in indices)
    assert kept == pytest.approx(counted + sum(ONLY_ON_THE_CPU[name].values()), rel=0.03)


def test_full_recomputation_keeps_a_layers_input_and_nothing_else(folders):
    _, planned = kept_by_a_layer(folders["dense"], "none")
    assert kept_per_token(planned, "full") == 4 * 32
    assert kept_per_token(planned, "none") > kept_per_token(planned, "selective") > kept_per_token(planned, "full")


def memory_of(folder: Path, imbalance: float = 1.0, **parallel: object) -> RankMemory:
    """The first rank of a layout, given one micro-batch of 4096 tokens."""
    hf, section = read_config(folder), ParallelSection.model_validate(parallel)
    policy = PlannedPolicy(hf, family_of(hf, "-"), section, 2, torch.bfloat16, "none", OPTIM, imbalance)
    shard = estimated_shards(policy)[0]
    return rank_memory(shard, policy, Load(4096, microbatches=1, swaps=False, bucket_bytes=1 << 20, reserve=0))


def test_a_context_parallel_rank_keeps_its_part_and_works_on_the_keys_and_values_of_others(folders):
    whole = memory_of(folders["dense"])
    ring, gathered = memory_of(folders["dense"], cp=4), memory_of(folders["dense"], cp=4, share_prefix=True)
    assert ring.activations == gathered.activations == whole.activations / 4
    assert ring.head < whole.head
    keys_and_values = 2 * 2 * 16 * 4096  # both, bfloat16, channels, tokens; their gradients take as much again
    assert gathered.working - ring.working == 2 * (keys_and_values - 2 * keys_and_values / 4)
    assert gathered.score - ring.score == keys_and_values - 2 * keys_and_values / 4


def test_the_fullest_expert_parallel_rank_is_planned_for(folders):
    even, full = (memory_of(folders["experts"], imbalance, ep=2) for imbalance in (1.0, 1.5))
    # Two layers; a copy is an input of 32, six tensors of 24 channels, a float32 weight and an index.
    assert full.activations - even.activations == 2 * 4096 * (0.5 * 2) * (2 * (32 + 6 * 24) + 4 + 8)
    assert memory_of(folders["experts"], 1.5) == memory_of(folders["experts"], 1.0)
