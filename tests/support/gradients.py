"""Gradients by Hugging Face name: the policy's, whatever its layout, and autograd's on the transformers model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from tiny_models import hf_logits

from megatron_urlvr.policy.batch import Row
from megatron_urlvr.policy.policy import Policy


def policy_gradients(policy: Policy) -> dict[str, torch.Tensor]:
    """The last update's gradients under the names of `export()`: whole tensors, the same on every rank. Collective.

    They travel as weights do: the export rules are tested on their own.
    """
    if policy.optimizer is not None and policy.optimizer.distributed:
        _gather_shards(policy)
    kept = {name: parameter.detach().clone() for name, parameter in policy.parameters.items()}
    for parameter in policy.parameters.values():
        parameter.data.copy_(parameter.main_grad)
    found = {name: tensor.clone() for name, tensor in policy.export()}
    for name, parameter in policy.parameters.items():
        parameter.data.copy_(kept[name])
    return found


def _gather_shards(policy: Policy) -> None:
    """The distributed optimizer reduces each rank's part of a bucket alone: fill in the others'."""
    for buffer in (each for chunk in policy.trained for each in chunk.buffers + chunk.expert_parallel_buffers):
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            own = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            parts = [torch.empty_like(own) for _ in range(group.size())]
            dist.all_gather(parts, own, group=group)
            bucket.grad_data.copy_(torch.cat(parts))


def clipped_loss(
    logps: Sequence[torch.Tensor], rows: Sequence[Row], *, low: float, high: float, kl: float = 0.0
) -> torch.Tensor:
    """sum over tokens of weight * (max(-A r, -A clip(r)) + kl * k3(logp, reference)), in plain float64."""
    total = torch.zeros((), dtype=torch.float64)
    for logp, row in zip(logps, rows, strict=True):
        old = logp.detach() if row.old_logp is None else row.old_logp.double()
        ratio = (logp - old).exp()
        bounded = ratio.clamp(1 - low, 1 + high)
        each = -torch.minimum(ratio * row.advantage, bounded * row.advantage)
        if kl:
            assert row.ref_logp is not None
            difference = row.ref_logp.double() - logp
            each = each + kl * (difference.exp() - 1 - difference)
        assert row.weight is not None
        total = total + (row.weight.double() * each).sum()
    return total


def hf_gradients(
    model: Any, rows: Sequence[Row], *, temperature: float = 1.0, vocab: int | None = None, **loss: float
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of `clipped_loss` by autograd through the transformers model, one row at a time."""
    model.zero_grad()
    logps = []
    for row in rows:
        z = (hf_logits(model, row)[:, :vocab] / temperature).log_softmax(-1)
        logps.append(z.gather(1, torch.tensor(list(row.response))[:, None])[:, 0])
    total = clipped_loss(logps, rows, **loss)
    total.backward()
    return float(total.detach()), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def relative_differences(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest difference of each tensor over the expected one's largest entry. KeyError when names differ."""
    if set(found) != set(expected):
        raise KeyError(f"names differ: {sorted(set(found) ^ set(expected))}")
    return {
        name: float((found[name].double() - expected[name].double()).abs().max() / expected[name].abs().max())
        for name in expected
    }


def weigh_equally(rows: Sequence[Row]) -> None:
    """Token-mean weights over these rows."""
    total = sum(len(row.response) for row in rows)
    for row in rows:
        row.weight = torch.full((len(row.response),), 1.0 / total)
