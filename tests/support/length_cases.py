"""Rows of very different lengths, of which the odd replicas have all the long ones, in any layout."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from checkpoint_cases import Likelihood
from gradients import policy_gradients, weigh_equally

from megatron_urlvr.config.model import ModelSection
from megatron_urlvr.config.optim import OptimSection
from megatron_urlvr.config.parallel import ParallelSection
from megatron_urlvr.distributed.exchange import my_share
from megatron_urlvr.distributed.layout import joined
from megatron_urlvr.policy import model as model_module
from megatron_urlvr.policy import policy as module
from megatron_urlvr.policy.batch import Row
from megatron_urlvr.policy.packing import PackedBatch, pack
from megatron_urlvr.policy.policy import Policy

BUDGET = 110
STEPS = 3
CLIP = 0.5
"""Less than the gradients' norm."""
EPS = 1e-3
"""So large that AdamW's steps depend on the size of gradients, clipped ones too, and not on the rounding of those near
zero."""


def model_of(layout: str) -> str:
    """Name of the model that a layout trains: a mixture where experts are spread."""
    return "qwen3_moe" if "ep2" in layout else "tied"


def skewed_groups() -> list[list[Row]]:
    """Eight prompts with four responses each: of 1 to 8 tokens to those that the even replicas get, of 20
    to 80 to the others'."""
    generator = torch.Generator().manual_seed(8)

    def tokens(low: int, high: int) -> list[int]:
        count = int(torch.randint(low, high + 1, (1,), generator=generator))
        return torch.randint(0, 29, (count,), generator=generator).tolist()

    groups = []
    for k in range(8):
        prompt = (*tokens(2, 9), k)
        groups.append([Row(prompt, tokens(20, 80) if k % 2 else tokens(1, 8)) for _ in range(4)])
    weigh_equally([row for group in groups for row in group])
    return groups


@dataclass
class SeenLengths:
    """What one rank saw of `skewed_groups`."""

    replica: int
    logp: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    """Of this replica's groups, by their numbers."""
    metrics: list[dict[str, float]] = field(default_factory=list)
    """Of an update that moves nothing, and of `STEPS` that do."""
    exported: dict[str, torch.Tensor] = field(default_factory=dict)
    """The weights that were loaded."""
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    """Of the first, by Hugging Face name."""
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    """After the last."""
    lengths: list[tuple[int, int]] = field(default_factory=list)
    """Of each micro-batch of the first: tokens that are no padding, and all."""


def observe_lengths(model: Path, parallel: Mapping[str, Any], *, padded: bool = True) -> SeenLengths:
    """Score and train in a layout; `padded`: as the policy does in a pipeline."""
    section = ParallelSection(**parallel, max_tokens_per_microbatch=BUDGET)
    optim = OptimSection(lr=1e-3, clip_grad=CLIP, eps=EPS)
    with contextlib.nullcontext() if padded else unpadded(), joined(section) as layout:
        policy = Policy(ModelSection(path=str(model)), section, layout, optim=optim)
        seen, loss = SeenLengths(layout.dp_rank), Likelihood()
        seen.exported = {name: tensor.clone() for name, tensor in policy.export()}
        mine = my_share(list(enumerate(skewed_groups())), layout)
        rows = [row for _, group in mine for row in group]
        found = iter(policy.score(rows, frozenset({"logp"})))
        seen.logp = {k: [next(found).get("logp") for _ in group] for k, group in mine}
        with noted(seen.lengths):
            seen.metrics.append(policy.update(rows, loss, lr=0.0))
        seen.gradients = policy_gradients(policy)
        seen.metrics += [policy.update(rows, loss, lr=1e-3) for _ in range(STEPS)]
        seen.weights = {name: tensor.clone() for name, tensor in policy.export()}
        return seen


@contextmanager
def unpadded() -> Iterator[None]:
    """Megatron-Core's pipeline announces the shape of each message, and micro-batches keep their own lengths."""
    make = model_module.transformer_config

    def announcing(*args: Any, **settings: Any) -> Any:
        config = make(*args, **settings)
        config.variable_seq_lengths = True
        return config

    def of_own_length(rows: list[Row], index: list[int], *, length: int = 0, **settings: Any) -> PackedBatch:
        return pack(rows, index, **settings)

    with (
        mock.patch.object(model_module, "transformer_config", announcing),
        mock.patch.object(module, "pack", of_own_length),
    ):
        yield


@contextmanager
def noted(lengths: list[tuple[int, int]]) -> Iterator[None]:
    """Note what is packed: of micro-batches that are packed again, to one length, the last."""
    packing = module.pack
    again = False

    def noting(rows: list[Row], index: list[int], **settings: Any) -> PackedBatch:
        nonlocal again
        batch, plain = packing(rows, index, **settings), pack(rows, index, share_prefix=settings["share_prefix"])
        if settings.get("length") and not again:
            again = True
            lengths.clear()
        lengths.append((plain.tokens.shape[1] - 1, batch.tokens.shape[1]))
        return batch

    with mock.patch.object(module, "pack", noting):
        yield
