"""Cases and comparisons that the kernel tests share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from urlvr_kernels import DIFFERENTIABLE, TokenStats, reference, tiling, torch_ops

RELATIVE = {torch.float64: 1e-11, torch.float32: 1e-5}
"""Largest relative error of a gradient (Frobenius norm) and of a statistic (against 1 + its size)."""


@dataclass
class Case:
    """A head, its input, and a gradient for each differentiable statistic."""

    hidden: torch.Tensor
    weight: torch.Tensor
    target: torch.Tensor
    grads: dict[str, torch.Tensor]

    def on(self, device: str) -> Case:
        """The same case on another device."""
        grads = {name: gradient.to(device) for name, gradient in self.grads.items()}
        return Case(self.hidden.to(device), self.weight.to(device), self.target.to(device), grads)


def make_case(rows: int, width: int, vocab: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Case:
    """Random normal hidden states and weights with logits of size about one."""
    g = torch.Generator().manual_seed(seed)
    return Case(
        torch.randn(rows, width, generator=g, dtype=torch.float64).to(dtype),
        (torch.randn(vocab, width, generator=g, dtype=torch.float64) / width**0.5).to(dtype),
        torch.randint(0, vocab, (rows,), generator=g),
        {name: torch.randn(rows, generator=g, dtype=torch.float64).to(dtype) for name in DIFFERENTIABLE},
    )


@contextmanager
def small_tiles(elements: int, rows: int) -> Iterator[None]:
    """Tiles of a few elements, so that small cases cross every border between tiles and chunks."""
    with (
        mock.patch.multiple(tiling, CPU_TILE_BYTES=max(elements * 4, 4096), CPU_TILE_ROWS=rows),
        mock.patch.object(torch_ops, "CPU_BAND_BYTES", elements * 4 // 3),
        mock.patch.object(torch_ops, "CPU_JOINED_BAND_BYTES", elements * 4 // 3),
    ):
        yield


def weighted_sum(stats: TokenStats, grads: dict[str, torch.Tensor], names: Sequence[str]) -> torch.Tensor:
    """The scalar whose gradient with respect to `stats.<name>` is `grads[name]`."""
    return torch.stack([(grads[name] * getattr(stats, name)).sum() for name in names]).sum()


def oracle(
    case: Case, outputs: Sequence[str], differentiate: Sequence[str], **arguments: object
) -> tuple[TokenStats, torch.Tensor | None, torch.Tensor | None]:
    """Float64 statistics and gradients (hidden, weight) by the reference and autograd."""
    hidden = case.hidden.double().clone().requires_grad_()
    weight = case.weight.double().clone().requires_grad_()
    stats = reference.lm_head_stats(hidden, weight, case.target, outputs=outputs, **arguments)  # type: ignore[arg-type]
    if not differentiate:
        return stats, None, None
    weighted_sum(stats, {k: g.double() for k, g in case.grads.items()}, differentiate).backward()
    return stats, hidden.grad, weight.grad


def assert_stats_close(found: TokenStats, expected: TokenStats, outputs: Sequence[str], tolerance: float) -> None:
    """Every statistic within `tolerance * (1 + |expected|)`; argmax equal."""
    for name in outputs:
        a, b = getattr(found, name), getattr(expected, name)
        if name == "argmax":
            assert torch.equal(a, b), f"argmax: {a} instead of {b}"
            continue
        error = ((a.double() - b.double()).abs() / (1 + b.double().abs())).max().item() if a.numel() else 0.0
        assert error <= tolerance, f"{name}: relative error {error:.1e} above {tolerance:.1e}"


def assert_grad_close(found: torch.Tensor | None, expected: torch.Tensor | None, tolerance: float, name: str) -> None:
    """Relative Frobenius error within `tolerance`."""
    assert found is not None
    assert expected is not None
    error = ((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()
    assert error <= tolerance, f"gradient of {name}: relative error {error:.1e} above {tolerance:.1e}"
