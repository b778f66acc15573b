"""The two public functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from . import checks
from .arguments import resolve_head, resolve_rows, resolve_shard
from .backends import choose_ops
from .call import HeadCall
from .device import on_cpu
from .head import head_statistics
from .logits import LogitsCall, logits_statistics
from .stats import TokenStats

DEFAULT_STASH_BYTES = 512 << 20
DEFAULT_WORKSPACE_BYTES = 128 << 20


def lm_head_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor | None,
    *,
    temperature: float | torch.Tensor = 1.0,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    outputs: Sequence[str] = ("logp", "entropy", "self_certainty"),
    row_index: torch.Tensor | None = None,
    upstream: Mapping[str, torch.Tensor] | None = None,
    logits_dtype: torch.dtype | None = None,
    stash_bytes: int = DEFAULT_STASH_BYTES,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    wgrad: str = "autograd",
    backend: str = "auto",
) -> TokenStats:
    """Statistics of the distributions `softmax(hidden @ weight.T / temperature)`, without whole logits ever existing.

    Differentiable in `hidden` and `weight` through logp, entropy, self_certainty and lse.

    Args:
        hidden: `[T, H]` float; under sequence parallelism this rank's `[T / tp, H]`.
        weight: `[V_local, H]`, the type of `hidden`: this rank's shard of the head.
        target: `[R]` int64 or int32 global ids, -100 for rows to leave out: their statistics are 0 (argmax -1), their
            gradient is zero, and whatever their hidden state holds goes nowhere. None where logp is not asked for.
        temperature: a positive number, or `[R]`.
        vocab_start: global id of this shard's first row.
        vocab_size: number of real entries of the whole vocabulary; weight rows beyond it count nowhere and get no
            gradient. None: all rows of all shards are real.
        tp_group: the tensor-parallel group; shards may be unequal, and each entry is in one of them. All ranks pass the
            same target, temperature, row_index and upstream, get the same outputs, and must feed them the same
            gradients. A weight or vocab_start that one rank alone cannot use is refused on all of them.
        sequence_parallel: `hidden` is sharded along T over tp_group; so is its gradient.
        outputs: names of `urlvr_kernels.OUTPUTS`, whose definitions and units `TokenStats` gives.
        row_index: `[R]` int64, the rows of (gathered) `hidden` to read; None reads all, R = T. A row that is read twice
            gets the sum of both gradients. target, temperature, upstream and the outputs have R entries.
        upstream: `{name: [R] gradient}`: computes dH and dW in the forward pass (three matrix products, nothing
            recomputed). The result's `loss = sum upstream[k] * k` is then the only output with a gradient, and the
            gradient that reaches it must be exactly 1.
        logits_dtype: type the logits are rounded to. None: float32 for float32 (float64 for float64) and on CPUs; the
            type of `hidden` on GPUs, where float32 may be asked for at twice the workspace.
        stash_bytes: logits kept for the backward instead of being computed again, at most this much. On GPUs the
            one-pass form uses it for larger blocks.
        workspace_bytes: logits that exist at once, at most this much (but at least one tile).
        wgrad: "autograd" returns the weight's gradient; "main_grad" adds it to `weight.main_grad` and sets
            `grad_added_to_main_grad`, as Megatron's gradient accumulation fusion does.
        backend: "auto", "torch", "triton" or "cuda".

    Returns `[R]` float32 each (float64 for float64 inputs; argmax int64).

    Raises ValueError for an argument that cannot be used, in a sentence that names it. On GPUs, values of target and
    temperature, and what other ranks say of their shards, are checked on the device (`torch._assert_async`), so that
    nothing waits for it.
    """
    checks.check_hidden(hidden, wgrad, stash_bytes, workspace_bytes)
    weight, shard = resolve_head(weight, hidden, vocab_start, vocab_size, tp_group, wgrad)
    checks.check_parallel(sequence_parallel, tp_group, upstream is not None and shard.tp.size > 1, vocab_size)
    names = checks.check_outputs(outputs, target, upstream)
    scattered = sequence_parallel and shard.tp.size > 1
    total = hidden.shape[0] * (shard.tp.size if scattered else 1)
    rows = resolve_rows("hidden", hidden, shard, total, target, temperature, row_index, upstream)
    rows = rows.without_ignored() if _drops_ignored_rows(hidden) else rows.with_ignored_blanked()
    ops, dtype = choose_ops(backend, hidden), checks.resolve_logits_dtype(logits_dtype, hidden)
    call = HeadCall(ops, names, shard, rows, scattered, dtype, stash_bytes, workspace_bytes, wgrad)
    return rows.spread(head_statistics(hidden, weight, call))


def logits_stats(
    logits: torch.Tensor,
    target: torch.Tensor | None,
    *,
    temperature: float | torch.Tensor = 1.0,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    outputs: Sequence[str] = ("logp", "entropy", "self_certainty"),
    inplace_grad: bool = False,
    backend: str = "auto",
) -> TokenStats:
    """The same statistics from logits that exist: `[T, V_local]`, this rank's columns; -inf entries are allowed.

    Differentiable in `logits`. Arguments as of `lm_head_stats`; `inplace_grad` writes the gradient over the logits,
    which must then not be needed again (autograd refuses a second backward). A row with -inf entries has infinite
    self-certainty.
    """
    checks.check_matrix("logits", logits, "[T, V_local]")
    shard = resolve_shard("logits", logits.shape[1], vocab_start, vocab_size, tp_group)
    names = checks.check_outputs(outputs, target)
    rows = resolve_rows("logits", logits, shard, logits.shape[0], target, temperature)
    call = LogitsCall(choose_ops(backend, logits), names, shard, rows, inplace_grad)
    return rows.spread(logits_statistics(logits, call))


def _drops_ignored_rows(hidden: torch.Tensor) -> bool:
    """On CPUs ignored rows are dropped. A GPU cannot be asked how many there are without waiting for it, so there they
    are blanked instead."""
    return on_cpu(hidden)
