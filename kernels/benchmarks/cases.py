"""What is measured: shapes, data, and the gradients that flow back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from urlvr_kernels import DIFFERENTIABLE


@dataclass(frozen=True)
class Shape:
    """T tokens, hidden width H, V vocabulary entries on this device (a tensor-parallel rank's share, say)."""

    tokens: int
    width: int
    vocab: int

    @staticmethod
    def parse(text: str) -> Shape:
        """From "T,H,V"."""
        return Shape(*(int(part) for part in text.split(",")))

    def __str__(self) -> str:
        return f"T={self.tokens}, H={self.width}, V={self.vocab}"

    def gemm_flops(self) -> float:
        """Of one matrix product, 2 T H V: a forward has one, a backward two, and one more to recompute the logits."""
        return 2.0 * self.tokens * self.width * self.vocab


@dataclass
class Case:
    """Normal hidden states and weights (power draw depends on the data), logits of standard deviation 2, some peaks."""

    shape: Shape
    hidden: torch.Tensor
    weight: torch.Tensor
    target: torch.Tensor
    grads: dict[str, torch.Tensor]

    @staticmethod
    def make(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Case:
        """The same numbers for the same seed, shape and device."""
        g = torch.Generator(device).manual_seed(seed)
        hidden = torch.randn(shape.tokens, shape.width, generator=g, device=device)
        weight = torch.randn(shape.vocab, shape.width, generator=g, device=device) * (2.0 / shape.width**0.5)
        target = torch.randint(0, shape.vocab, (shape.tokens,), generator=g, device=device)
        confident = slice(0, shape.tokens // 4)  # a quarter of the rows point at their target's embedding
        hidden[confident] += 2.5 * weight[target[confident]]
        grads = {name: torch.randn(shape.tokens, generator=g, device=device) / shape.tokens for name in DIFFERENTIABLE}
        return Case(shape, hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), target, grads)

    def clear(self) -> None:
        """Forgets the gradients of the last run."""
        self.hidden.grad = self.weight.grad = None
