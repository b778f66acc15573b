"""The head as autograd sees it: the two-pass form, and the one-pass form for gradients known beforehand."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .call import HeadCall
from .device import on_cpu
from .gradients import announce_main_grad
from .one_pass import one_pass
from .passes import Stash, backward_pass, forward_pass
from .rowstate import incoming, statistics
from .stats import DIFFERENTIABLE


def head_statistics(hidden: torch.Tensor, weight: torch.Tensor, call: HeadCall) -> dict[str, torch.Tensor]:
    """Statistics by name, `[R]` each (and `loss`, a scalar, in the one-pass form)."""
    differentiable = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if not differentiable:
        state, _ = forward_pass(hidden, weight, call, stash_bytes=0)
        _, _, found = statistics(state, call.outputs, call.shard.size(state))
        if call.rows.upstream is not None:
            found["loss"] = _linear_loss(found, call.rows.upstream)
        return found
    if call.rows.upstream is not None:
        values = _OnePass.apply(hidden, weight, call)
        return dict(zip(("loss", *call.outputs), values, strict=True))
    values = _TwoPass.apply(hidden, weight, call)
    return dict(zip(call.outputs, values, strict=True))


class _TwoPass(torch.autograd.Function):
    """Statistics forward; gradients from recomputed (or stashed) tiles backward."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, call: HeadCall) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        state, stash = forward_pass(hidden, weight, call, stash_bytes=call.stash_bytes)
        vocab = call.shard.size(state)
        lse, entropy, found = statistics(state, call.outputs, vocab)
        ctx.mark_non_differentiable(*(value for name, value in found.items() if name not in DIFFERENTIABLE))
        ctx.save_for_backward(hidden, weight, lse, entropy)
        ctx.call, ctx.stash, ctx.vocab = call, stash, vocab
        ctx.main = weight if call.wgrad == "main_grad" else None  # the object that owns main_grad
        return tuple(found[name] for name in call.outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, lse, entropy = ctx.saved_tensors
        call: HeadCall = ctx.call
        given = {k: g for k, g in zip(call.outputs, grads, strict=True) if g is not None and k in DIFFERENTIABLE}
        if not given:
            return None, None, None
        gradient = incoming(given, ctx.vocab, lse.dtype).slopes(lse, entropy)
        stash: Stash = ctx.stash
        owner = weight if ctx.main is None else ctx.main
        grad_hidden, grad_weight = backward_pass(hidden, owner, call, gradient, stash, ctx.needs_input_grad[:2])
        if ctx.main is not None and ctx.needs_input_grad[1]:
            grad_weight = announce_main_grad(ctx.main)
        return grad_hidden, grad_weight, None


class _OnePass(torch.autograd.Function):
    """Gradients known beforehand: statistics, dH and dW in one pass; the backward hands them over."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, call: HeadCall) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        found, ctx.grad_hidden, ctx.grad_weight = one_pass(hidden, weight, call, ctx.needs_input_grad[:2])
        assert call.rows.upstream is not None
        found["loss"] = _linear_loss(found, call.rows.upstream)
        ctx.mark_non_differentiable(*(value for name, value in found.items() if name not in (*DIFFERENTIABLE, "loss")))
        ctx.main = weight if call.wgrad == "main_grad" and ctx.needs_input_grad[1] else None
        ctx.handed_over = False
        return found["loss"], *(found[name] for name in call.outputs)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_loss: torch.Tensor | None, *grads: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        if any(g is not None for g in grads):
            raise RuntimeError(
                "upstream: with `upstream` given, only `stats.loss` carries a gradient, because the gradients were "
                "computed in the forward pass; build the loss from `stats.loss` alone, or leave `upstream` out."
            )
        if grad_loss is None:
            return None, None, None
        message = (
            "upstream: the gradient that reaches `stats.loss` must be exactly 1, because the gradients were computed "
            "in the forward pass; put every factor (loss scale, 1/N) into `upstream`, or leave `upstream` out."
        )
        if not on_cpu(grad_loss):
            torch._assert_async((grad_loss == 1).all(), message)
        elif grad_loss.item() != 1:
            raise RuntimeError(message)
        if ctx.handed_over:
            raise RuntimeError("upstream: the gradients of one forward pass are handed over once; call backward once.")
        ctx.handed_over = True
        grad_hidden, grad_weight = ctx.grad_hidden, ctx.grad_weight
        ctx.grad_hidden = ctx.grad_weight = None
        return grad_hidden, grad_weight if ctx.main is None else announce_main_grad(ctx.main), None


def _linear_loss(found: dict[str, torch.Tensor], upstream: dict[str, torch.Tensor]) -> torch.Tensor:
    """sum_t sum_k upstream[k][t] * k[t], a scalar."""
    total = None
    for name, gradient in upstream.items():
        term = torch.dot(gradient.to(found[name].dtype), found[name])
        total = term if total is None else total + term
    assert total is not None
    return total
