"""The two public functions: checks, choice of backend, rows left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from . import checks
from .backends import choose_ops
from .call import HeadCall
from .device import on_cpu, wide_dtype
from .head import head_statistics
from .logits import LogitsCall, logits_statistics
from .stats import TokenStats
from .tp import TensorParallel

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
    """Statistics of the distributions `softmax(hidden @ weight.T / temperature)` without the logits ever existing
    whole.

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
        tp_group: the tensor-parallel group; shards may be unequal. All ranks pass the same target, temperature,
            row_index and upstream, get the same outputs, and must feed them the same gradients.
        sequence_parallel: `hidden` is sharded along T over tp_group; so is its gradient.
        outputs: names of `urlvr_kernels.OUTPUTS`.
        row_index: `[R]` int64, the rows of (gathered) `hidden` to read; a row that is read twice gets the sum of
            both gradients. None reads all, R = T.
            target, temperature, upstream and the outputs have R entries.
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

    Returns:
        TokenStats, `[R]` float32 each (float64 for float64 inputs; argmax int64).

    Raises:
        ValueError: an argument that cannot be used, in a sentence that names it. On GPUs, values of target and
            temperature are checked on the device (`torch._assert_async`), so that nothing waits for it.
    """
    checks.check_matrix("hidden", hidden, "[T, H]")
    checks.check_matrix("weight", weight, "[V_local, H]")
    checks.check_same("weight", weight, "hidden", hidden, dtype=True)
    checks.check_head(hidden, weight, wgrad, stash_bytes, workspace_bytes)
    tp = TensorParallel.of(tp_group)
    checks.check_parallel(sequence_parallel, tp_group, upstream is not None and tp.size > 1, vocab_size)
    valid = checks.check_vocabulary(weight.shape[0], vocab_start, vocab_size, tp.size > 1)
    names = checks.check_outputs(outputs, target)
    total = hidden.shape[0] * (tp.size if sequence_parallel else 1)
    if row_index is not None:
        checks.check_row_index(row_index, total, hidden)
    rows = total if row_index is None else row_index.shape[0]
    known_size = vocab_size if vocab_size is not None else (weight.shape[0] if tp.size == 1 else None)
    ignored = None if target is None else checks.check_target(target, rows, known_size, "hidden", hidden)
    inv_tau = checks.resolve_temperature(temperature, rows, wide_dtype(hidden.dtype), "hidden", hidden)
    if upstream is not None:
        checks.check_upstream(upstream, names, rows, "hidden", hidden)

    keep = None
    if ignored is not None and _drops_ignored_rows(hidden):
        assert target is not None
        keep, ignored = torch.nonzero(~ignored).squeeze(1), None
        target = target[keep]
        row_index = keep if row_index is None else row_index[keep]
        inv_tau = inv_tau[keep] if isinstance(inv_tau, torch.Tensor) else inv_tau
        upstream = None if upstream is None else {name: value[keep] for name, value in upstream.items()}
    elif ignored is not None and upstream is not None:
        upstream = {name: value.masked_fill(ignored, 0.0) for name, value in upstream.items()}
    call = HeadCall(
        ops=choose_ops(backend, hidden),
        outputs=names,
        target=target,
        inv_tau=inv_tau,
        row_index=row_index,
        ignored=ignored,
        first=vocab_start,
        valid=valid,
        vocab_size=vocab_size,
        tp=tp,
        sequence_parallel=sequence_parallel and tp.size > 1,
        logits_dtype=checks.resolve_logits_dtype(logits_dtype, hidden),
        stash_bytes=stash_bytes,
        workspace_bytes=workspace_bytes,
        wgrad=wgrad,
        upstream=None if upstream is None else dict(upstream),
    )
    return _assemble(head_statistics(hidden, weight, call), rows, keep, ignored)


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
    tp = TensorParallel.of(tp_group)
    valid = checks.check_vocabulary(logits.shape[1], vocab_start, vocab_size, tp.size > 1, holder="logits")
    names = checks.check_outputs(outputs, target)
    rows = logits.shape[0]
    known_size = vocab_size if vocab_size is not None else (logits.shape[1] if tp.size == 1 else None)
    ignored = None if target is None else checks.check_target(target, rows, known_size, "logits", logits)
    call = LogitsCall(
        ops=choose_ops(backend, logits),
        outputs=names,
        target=target,
        inv_tau=checks.resolve_temperature(temperature, rows, wide_dtype(logits.dtype), "logits", logits),
        ignored=ignored,
        first=vocab_start,
        valid=valid,
        vocab_size=vocab_size,
        tp=tp,
        inplace_grad=inplace_grad,
    )
    return _assemble(logits_statistics(logits, call), rows, None, ignored)


def _drops_ignored_rows(hidden: torch.Tensor) -> bool:
    """On CPUs ignored rows are dropped. A GPU cannot be asked how many there are without waiting for it, so there they
    are blanked instead."""
    return on_cpu(hidden)


def _assemble(
    found: dict[str, torch.Tensor], rows: int, keep: torch.Tensor | None, ignored: torch.Tensor | None
) -> TokenStats:
    """TokenStats of all rows: rows left out are 0, their argmax -1."""
    out = TokenStats(loss=found.pop("loss", None))
    for name, value in found.items():
        blank = -1 if name == "argmax" else 0
        if keep is not None:
            value = torch.full((rows,), blank, dtype=value.dtype, device=value.device).index_copy(0, keep, value)
        elif ignored is not None:
            value = value.masked_fill(ignored, blank)
        setattr(out, name, value)
    return out
