"""Arguments that cannot be used are refused in a sentence that begins with the argument's name."""

from __future__ import annotations

import pytest
import torch
from urlvr_kernels import lm_head_stats, logits_stats

HIDDEN, WEIGHT, TARGET = torch.randn(5, 4), torch.randn(9, 4), torch.arange(5)

HEAD_REFUSALS = {
    "hidden of three dimensions": ({"hidden": HIDDEN[None]}, r"^hidden: shape \(1, 5, 4\)"),
    "hidden of integers": ({"hidden": HIDDEN.int()}, r"^hidden: dtype torch.int32"),
    "hidden not a tensor": ({"hidden": [[1.0]]}, r"^hidden: a list"),
    "weight too narrow": ({"weight": WEIGHT[:, :3]}, r"^weight: shape \(9, 3\)"),
    "weight of another type": ({"weight": WEIGHT.double()}, r"^weight: dtype torch.float64, but hidden"),
    "weight on another device": ({"weight": WEIGHT.to("meta")}, r"^weight: on meta, but hidden is on cpu"),
    "weight without rows": ({"weight": WEIGHT[:0]}, r"^weight: an empty shard"),
    "target too short": ({"target": TARGET[:4]}, r"^target: shape \(4,\)"),
    "target of floats": ({"target": TARGET.float()}, r"^target: dtype torch.float32"),
    "target too large": ({"target": TARGET + 5}, r"^target: ids outside 0 \.\. 8"),
    "target in the padding": ({"vocab_size": 4}, r"^target: ids outside 0 \.\. 3"),
    "target negative": ({"target": TARGET - 1}, r"^target: ids outside 0 \.\. 8; rows to leave out carry -100"),
    "target missing": ({"target": None}, r"^target: missing, and outputs asks for logp"),
    "temperature zero": ({"temperature": 0.0}, r"^temperature: 0.0; it must be positive"),
    "temperature infinite": ({"temperature": float("inf")}, r"^temperature: inf"),
    "temperature not a number": ({"temperature": float("nan")}, r"^temperature: nan"),
    "one temperature negative": ({"temperature": torch.tensor([1, 1, -1, 1, 1.0])}, r"^temperature: every entry"),
    "one temperature nan": ({"temperature": torch.tensor([1, 1, torch.nan, 1, 1])}, r"^temperature: every entry"),
    "temperature a string": ({"temperature": "hot"}, r"^temperature: a str; pass a number"),
    "temperature a list": ({"temperature": [1.0] * 5}, r"^temperature: a list"),
    "temperatures too few": ({"temperature": torch.ones(4)}, r"^temperature: shape \(4,\)"),
    "vocab_start alone": ({"vocab_start": 3}, r"^vocab_start: 3 without tp_group"),
    "vocab_start negative": ({"vocab_start": -1}, r"^vocab_start: -1"),
    "vocab_size zero": ({"vocab_size": 0}, r"^vocab_size: 0"),
    "vocab_size too large": ({"vocab_size": 10}, r"^vocab_size: 10, but weight holds 9"),
    "sequence_parallel alone": ({"sequence_parallel": True}, r"^sequence_parallel: True without tp_group"),
    "outputs unknown": ({"outputs": ("logp", "perplexity")}, r"^outputs: \['perplexity'\] are unknown"),
    "outputs empty": ({"outputs": ()}, r"^outputs: empty"),
    "outputs one string": ({"outputs": "logp"}, r"^outputs: 'logp' is one string"),
    "outputs nothing": ({"outputs": None}, r"^outputs: a NoneType"),
    "outputs twice": ({"outputs": ("logp", "logp")}, r"^outputs: .* twice"),
    "row_index of int32": ({"row_index": TARGET.int()}, r"^row_index: it must be a vector of int64"),
    "row_index too large": ({"row_index": TARGET + 1}, r"^row_index: numbers outside 0 \.\. 4"),
    "logits_dtype narrower": ({"logits_dtype": torch.bfloat16}, r"^logits_dtype: torch.bfloat16"),
    "stash_bytes negative": ({"stash_bytes": -1}, r"^stash_bytes: -1"),
    "stash_bytes nothing": ({"stash_bytes": None}, r"^stash_bytes: None; it must be a whole number"),
    "workspace_bytes a fraction": ({"workspace_bytes": 0.5}, r"^workspace_bytes: 0.5; it must be a whole number"),
    "workspace_bytes zero": ({"workspace_bytes": 0}, r"^workspace_bytes: 0"),
    "wgrad unknown": ({"wgrad": "fused"}, r"^wgrad: 'fused'"),
    "backend unknown": ({"backend": "cutlass"}, r"^backend: 'cutlass' is unknown"),
    "triton on a CPU": ({"backend": "triton"}, r"^backend: 'triton'"),
    "triton in float64": (
        {"backend": "triton", "hidden": HIDDEN.double(), "weight": WEIGHT.double()},
        r"^backend: .*64",
    ),
    "upstream a tensor": ({"upstream": torch.ones(5)}, r"^upstream: a Tensor"),
    "upstream empty": ({"upstream": {}}, r"^upstream: empty"),
    "upstream without gradient": ({"upstream": {"max_prob": torch.ones(5)}}, r"^upstream: 'max_prob' carries no"),
    "upstream not asked for": ({"upstream": {"lse": torch.ones(5)}}, r"^upstream: 'lse' is not among outputs"),
    "upstream too short": ({"upstream": {"logp": torch.ones(4)}}, r"^upstream\['logp'\]: shape \(4,\)"),
    "upstream with grad": (
        {"upstream": {"logp": torch.ones(5, requires_grad=True)}},
        r"^upstream: 'logp' requires grad",
    ),
}


@pytest.mark.parametrize("name", HEAD_REFUSALS)
def test_the_head_refuses(name):
    changed, sentence = HEAD_REFUSALS[name]
    with pytest.raises(ValueError, match=sentence):
        lm_head_stats(**{"hidden": HIDDEN, "weight": WEIGHT, "target": TARGET, **changed})


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"logits": torch.randn(5, 9, 1)}, r"^logits: shape"),
        ({"logits": torch.randn(5, 0)}, r"^logits: an empty shard"),
        ({"target": TARGET + 5}, r"^target: ids outside 0 \.\. 8"),
        ({"target": TARGET.to("meta")}, r"^target: on meta, but logits is on cpu"),
        ({"temperature": -1.0}, r"^temperature: -1.0"),
        ({"vocab_size": 10}, r"^vocab_size: 10, but logits holds 9"),
    ],
)
def test_logits_stats_refuses(changed, sentence):
    with pytest.raises(ValueError, match=sentence):
        logits_stats(**{"logits": torch.randn(5, 9), "target": TARGET, **changed})
