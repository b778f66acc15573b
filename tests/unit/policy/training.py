"""Policies that are trained a few steps, and all that training changes in them."""

from __future__ import annotations

import torch
from test_weights import Likelihood, rows

from megatron_urlvr.config.optim import OptimSection
from megatron_urlvr.policy.policy import Policy

SECTION = OptimSection(lr=1e-2, ema_decay=0.8, weight_decay=0.1)
TRAINER = {"step": 3, "stream": {"epoch": 1}}
"""What the trainer keeps in a checkpoint."""


def train(policy: Policy, steps: int) -> None:
    for _ in range(steps):
        policy.update(rows(), Likelihood(), lr=1e-2)


def everything(policy: Policy) -> dict[str, torch.Tensor]:
    """Weights, moments, step counts and moving average, copied."""
    found = {f"weight {name}": p.detach().clone() for name, p in policy.parameters.items()}
    assert policy.optimizer is not None
    for part in policy.optimizer.parts:
        for i, state in enumerate(part.optimizer.state.values()):
            found |= {f"moment {i} {name}": torch.as_tensor(value).clone() for name, value in state.items()}
    if policy.ema is not None:
        found |= {f"ema {name}": tensor.clone() for name, tensor in policy.ema.tensors.items()}
    return found


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different
