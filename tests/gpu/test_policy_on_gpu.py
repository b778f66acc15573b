"""The policy on a real GPU, as `run.device: auto` makes it: a tiny model's scores and gradients beside transformers'
own on the same device, both measured against transformers in float64.

Where Transformer Engine is installed, its layers are what is tested. Everything that can be tested without a GPU is in
`tests/unit/policy`.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from gradients import policy_gradients
from tiny_models import hf_logits, hf_model, random_rows, stats_of_logits, write_qwen2

from megatron_urlvr.algorithms.losses import build_loss
from megatron_urlvr.config.algorithm import KLSection, LossSection
from megatron_urlvr.config.model import ModelSection
from megatron_urlvr.config.optim import OptimSection
from megatron_urlvr.config.parallel import ParallelSection
from megatron_urlvr.distributed.layout import Layout, joined
from megatron_urlvr.policy.batch import Row
from megatron_urlvr.policy.policy import Policy
from megatron_urlvr.types import STATISTICS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")]

FLOOR = {"float32": 5e-3, "bfloat16": 1e-3}
"""Error that is allowed whatever transformers' is: Transformer Engine multiplies float32 in TF32."""


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    with joined(ParallelSection()) as layout:
        yield layout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen2(tmp_path_factory.mktemp("models") / "untied")


def trained_rows() -> list[Row]:
    """Rows of the first policy-gradient step: advantages of both signs, every token of weight 1/100."""
    rows = random_rows(16, vocab=29)
    for i, row in enumerate(rows):
        row.advantage, row.weight = (-1.0) ** i * (1 + i / 10), torch.full((len(row.response),), 0.01)
    return rows


def of_transformers(model: Any, rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """Every statistic of every token, and the gradient of -sum weight * advantage * logp, flat, by transformers."""
    model.zero_grad()
    stats = [stats_of_logits(hf_logits(model, row).double(), row.response) for row in rows]
    torch.stack(
        [-(row.weight * row.advantage * s["logp"]).sum() for row, s in zip(rows, stats, strict=True)]
    ).sum().backward()
    values = torch.cat([torch.cat([s[name].detach() for s in stats]) for name in sorted(STATISTICS)])
    return values, flat({name: parameter.grad for name, parameter in model.named_parameters()})


def flat(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradients[name].double().cpu().flatten() for name in sorted(gradients)])


# "auto" is Transformer Engine's packed attention, but not in float32, which it does not have.
@pytest.mark.parametrize(("dtype", "share_prefix"), [("bfloat16", "auto"), ("bfloat16", True), ("float32", "auto")])
def test_scores_and_gradients_are_about_as_exact_as_transformers_own(layout, folder, dtype, share_prefix):
    assert layout.device.type == "cuda"
    rows = trained_rows()
    exact = of_transformers(hf_model(folder), rows)
    model = copy.deepcopy(hf_model(folder, getattr(torch, dtype))).to(layout.device)
    theirs = of_transformers(model, rows)
    policy = Policy(
        ModelSection(path=str(folder), dtype=dtype),
        ParallelSection(share_prefix=share_prefix),
        layout,
        optim=OptimSection(lr=1e-3, clip_grad=0.0),
    )
    scores = policy.score(rows, STATISTICS)
    values = torch.cat([torch.cat([s.get(name).double() for s in scores]) for name in sorted(STATISTICS)])
    policy.update(rows, build_loss(LossSection(), KLSection()), lr=0.0)
    ours = values, flat(policy_gradients(policy))
    for what, mine, other, right in zip(("statistics", "gradient"), ours, theirs, exact, strict=True):
        error, yardstick = ((x - right).norm() / right.norm() for x in (mine, other))
        assert error <= 2 * yardstick + FLOOR[dtype], f"{what}: {error:.1e}, transformers {yardstick:.1e}"
