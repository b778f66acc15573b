"""The Triton backend: GEMMs by the library, everything per logit by the kernels of `triton_kernels`.

Runs on GPUs, and on CPUs under Triton's interpreter (`TRITON_INTERPRET=1` set before Python imports triton), which is
how the kernels are tested where there is no GPU.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton

from . import triton_kernels as kernels
from .rowstate import FIELDS, Slopes, Wanted

STATE_BLOCK = 4096
"""Columns a program reads at a time: 16 bfloat16 values a thread, two 16-byte loads in flight."""
DLOGITS_BLOCK = 2048
MERGE_BLOCK = 128
WARPS = 8
PROGRAMS_WANTED = 4 * 132
"""Rows are split over the columns when there are fewer than this: four programs for each of an H100's
multiprocessors."""


def is_interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter."""
    return bool(triton.knobs.runtime.interpret)


class TritonOps:
    """See `torch_ops.TorchOps` for the contract of the operations. float32, bfloat16 and float16 logits."""

    name = "triton"
    fused = True

    def row_state(
        self,
        logits: torch.Tensor,
        state: torch.Tensor,
        wanted: Wanted,
        *,
        target: torch.Tensor | None,
        first: int,
        inv_tau: torch.Tensor | float | None,
        whole: bool = False,
        consume: bool = False,
        masked: bool = False,
    ) -> None:
        """One read of `logits` `[R, C]`; few rows are split over several programs, whose states are merged."""
        rows, columns = logits.shape
        if rows == 0:
            return
        logits = _unit_stride(logits)
        block = min(STATE_BLOCK, triton.next_power_of_2(columns))
        splits = min(max(1, PROGRAMS_WANTED // rows), triton.cdiv(columns, block))
        width = triton.cdiv(triton.cdiv(columns, splits), block) * block
        splits = triton.cdiv(columns, width)
        parts = state.unsqueeze(0) if splits == 1 else state.new_empty(splits, FIELDS, rows)
        tau, number = _temperature(inv_tau, logits)
        with _device(logits):
            kernels.row_state_kernel[(rows, splits)](
                logits,
                logits.stride(0),
                parts,
                parts.stride(1),
                parts.stride(0),
                logits if target is None else target,
                tau,
                number,
                first,
                columns,
                width,
                WITH_CENTRED=wanted.centred,
                WITH_SPREAD=wanted.spread,
                WITH_TARGET=wanted.target,
                RANKED=wanted.second or wanted.argmax,
                TAU_PER_ROW=isinstance(inv_tau, torch.Tensor),
                BLOCK=block,
                num_warps=WARPS,
            )
        if splits > 1:
            self._merge_into(parts, state, wanted)

    def dlogits(
        self,
        logits: torch.Tensor,
        out: torch.Tensor,
        slopes: Slopes,
        *,
        target: torch.Tensor | None,
        first: int,
        inv_tau: torch.Tensor | float | None,
        whole: bool = False,
        masked: bool = False,
    ) -> None:
        """One read of `logits` `[R, C]`, one write of `out`."""
        rows, columns = logits.shape
        if rows == 0:
            return
        if out.stride(1) != 1:
            dense = torch.empty(out.shape, dtype=out.dtype, device=out.device)
            self.dlogits(logits, dense, slopes, target=target, first=first, inv_tau=inv_tau)
            out.copy_(dense)
            return
        logits = _unit_stride(logits)
        block = min(DLOGITS_BLOCK, triton.next_power_of_2(columns))
        tau, number = _temperature(inv_tau, logits)
        with _device(logits):
            kernels.dlogits_kernel[(rows, triton.cdiv(columns, block))](
                logits,
                logits.stride(0),
                out,
                out.stride(0),
                logits if target is None else target,
                tau,
                number,
                slopes.lse,
                slopes.alpha,
                slopes.lse if slopes.beta is None else slopes.beta,
                slopes.lse if slopes.label is None else slopes.label,
                slopes.lse if slopes.uniform is None else slopes.uniform,
                first,
                columns,
                WITH_BETA=slopes.beta is not None,
                WITH_LABEL=slopes.label is not None,
                WITH_UNIFORM=slopes.uniform is not None,
                TAU_PER_ROW=isinstance(inv_tau, torch.Tensor),
                BLOCK=block,
                num_warps=WARPS,
            )

    def merge(self, states: torch.Tensor, wanted: Wanted) -> torch.Tensor:
        """`[n, 8, T]` -> `[8, T]` in one kernel; see `rowstate.merge`."""
        if states.shape[0] == 1 or states.shape[2] == 0:
            return states[0]
        out = states.new_empty(states.shape[1:])
        self._merge_into(states, out, wanted)
        return out

    def _merge_into(self, states: torch.Tensor, out: torch.Tensor, wanted: Wanted) -> None:
        rows = states.shape[2]
        with _device(states):
            kernels.merge_kernel[(triton.cdiv(rows, MERGE_BLOCK),)](
                states,
                states.stride(0),
                states.stride(1),
                out,
                out.stride(0),
                states.shape[0],
                rows,
                WITH_CENTRED=wanted.centred,
                WITH_SPREAD=wanted.spread,
                WITH_TARGET=wanted.target,
                RANKED=wanted.second or wanted.argmax,
                BLOCK=MERGE_BLOCK,
                num_warps=4,
            )


def _unit_stride(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _temperature(inv_tau: torch.Tensor | float | None, like: torch.Tensor) -> tuple[torch.Tensor, float]:
    """What the kernels take: a pointer (to anything where unused) and a number."""
    if isinstance(inv_tau, torch.Tensor):
        return inv_tau, 1.0
    return like, 1.0 if inv_tau is None else inv_tau


def _device(tensor: torch.Tensor) -> torch.cuda.device | nullcontext[None]:
    """Launches go to the tensor's device, also from autograd's threads, whose current device is another."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
