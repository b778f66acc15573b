"""The activations that a plan counts by hand are those that a real layer keeps for its backward."""

from pathlib import Path

import pytest
import torch
from tiny_models import write_qwen2

from megatron_urlvr.config.model import ModelSection
from megatron_urlvr.config.parallel import ParallelSection
from megatron_urlvr.distributed.layout import joined
from megatron_urlvr.launch.plan.memory import kept_per_token, layer_activations
from megatron_urlvr.launch.plan.shards import PlannedPolicy
from megatron_urlvr.policy.attention import PackedSequence
from megatron_urlvr.policy.batch import Row, pack
from megatron_urlvr.policy.hf.families import family_of
from megatron_urlvr.policy.policy import Policy


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_qwen2(tmp_path_factory.mktemp("model") / "small", tokenizer=False)


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


def test_a_layer_keeps_what_is_counted_and_what_only_the_cpu_path_adds(folder):
    kept, planned = kept_by_a_layer(folder, "none")
    hidden = heads = 32
    only_on_the_cpu = {
        "normalised inputs, which Transformer Engine computes again": 2 * 4 * hidden,
        "one over the root mean squares": 2 * 4,
        "attention's output, packed and in its table": 4 * heads,
        "cosines and sines of queries and keys": 4 * 4 * 8,
    }
    counted = sum(layer_activations(planned).values()) + sum(only_on_the_cpu.values())
    assert kept == pytest.approx(counted, rel=0.03)


def test_full_recomputation_keeps_a_layers_input_and_nothing_else(folder):
    _, planned = kept_by_a_layer(folder, "none")
    assert kept_per_token(planned, "full") == 4 * 32
    assert kept_per_token(planned, "none") > kept_per_token(planned, "selective") > kept_per_token(planned, "full")
