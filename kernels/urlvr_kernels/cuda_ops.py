"""The CUDA backend: GEMMs by the library, everything per logit by the kernels of `csrc/`, called through ctypes."""

from __future__ import annotations

import ctypes

import torch

from .cuda_build import load
from .rowstate import FIELDS, Slopes, Wanted

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
WITH_CENTRED, RANKED, WITH_TARGET, TARGET_64, WITH_BETA, WITH_LABEL, WITH_UNIFORM = (1 << i for i in range(7))
BLOCKS_WANTED = 2 * 132
"""Rows are split over the columns when there are fewer than this: two blocks for each of an H100's multiprocessors."""
SPLIT_COLUMNS = 4096
"""Columns that a block should have at least; splits are multiples of this, so that all begin on the same alignment."""
MAX_SPLITS = 8
"""Blocks of a portable cluster."""

_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float


class CudaOps:
    """See `torch_ops.TorchOps` for the contract of the operations. float32, bfloat16 and float16 logits on GPUs."""

    name = "cuda"
    fused = True

    def __init__(self, device: torch.device) -> None:
        major, minor = torch.cuda.get_device_capability(device)
        self._library = load(f"{major}{minor}")
        self._clusters = major >= 9

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
        """One read of `logits` `[R, C]`; few rows are split over the blocks of a cluster."""
        rows, columns = logits.shape
        if rows == 0:
            return
        logits = logits if logits.stride(1) == 1 else logits.contiguous()
        splits, width = _split(rows, columns)
        cluster = self._clusters and splits > 1
        alone = splits == 1 or cluster
        parts = state.unsqueeze(0) if alone else state.new_empty(splits, FIELDS, rows)
        tau, number = _temperature(inv_tau)
        flags = WITH_CENTRED * wanted.centred | RANKED * (wanted.second or wanted.argmax)
        if wanted.target and target is not None:
            flags |= WITH_TARGET | TARGET_64 * (target.dtype == torch.int64)
        self._call(
            "urlvr_row_state",
            logits.device,
            (_P(logits.data_ptr()), _I(DTYPES[logits.dtype]), _L(logits.stride(0)), _L(rows), _I(columns)),
            (_I(splits), _I(width), _I(cluster)),
            (_P(parts.data_ptr()), _L(parts.stride(1)), _L(parts.stride(0))),
            (_pointer(target), _I(first), tau, number, _I(flags)),
        )
        if not alone:
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
        logits = logits if logits.stride(1) == 1 else logits.contiguous()
        tau, number = _temperature(inv_tau)
        flags = WITH_BETA * (slopes.beta is not None) | WITH_UNIFORM * (slopes.uniform is not None)
        if slopes.label is not None and target is not None:
            flags |= WITH_LABEL | TARGET_64 * (target.dtype == torch.int64)
        self._call(
            "urlvr_dlogits",
            logits.device,
            (_P(logits.data_ptr()), _I(DTYPES[logits.dtype]), _L(logits.stride(0)), _L(rows), _I(columns)),
            (_P(out.data_ptr()), _I(DTYPES[out.dtype]), _L(out.stride(0))),
            (_pointer(target), _I(first), tau, number),
            (_pointer(slopes.lse), _pointer(slopes.alpha), _pointer(slopes.beta), _pointer(slopes.label)),
            (_pointer(slopes.uniform), _I(flags)),
        )

    def merge(self, states: torch.Tensor, wanted: Wanted) -> torch.Tensor:
        """`[n, 8, T]` -> `[8, T]` in one kernel; see `rowstate.merge`."""
        if states.shape[0] == 1 or states.shape[2] == 0:
            return states[0]
        out = states.new_empty(states.shape[1:])
        self._merge_into(states, out, wanted)
        return out

    def _merge_into(self, states: torch.Tensor, out: torch.Tensor, wanted: Wanted) -> None:
        count, _, rows = states.shape
        flags = RANKED * (wanted.second or wanted.argmax)
        self._call(
            "urlvr_merge",
            states.device,
            (_P(states.data_ptr()), _L(states.stride(0)), _L(states.stride(1)), _P(out.data_ptr()), _L(out.stride(0))),
            (_I(count), _L(rows), _I(flags)),
        )

    def _call(self, name: str, device: torch.device, *groups: tuple[object, ...]) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        stream = torch.cuda.current_stream(device).cuda_stream
        arguments = [argument for group in groups for argument in group]
        with torch.cuda.device(device):
            code = getattr(self._library, name)(*arguments, _I(index), _P(stream))
        if code:
            raise RuntimeError(f"{name} failed: {self._library.urlvr_error(code).decode()}")


def _split(rows: int, columns: int) -> tuple[int, int]:
    """Into how many parts the columns of so few rows are split, and the width of a part."""
    wanted = min(MAX_SPLITS, max(1, BLOCKS_WANTED // rows), max(1, columns // SPLIT_COLUMNS))
    width = -(-columns // (wanted * SPLIT_COLUMNS)) * SPLIT_COLUMNS
    return (1, columns) if wanted == 1 else (-(-columns // width), width)


def _temperature(inv_tau: torch.Tensor | float | None) -> tuple[ctypes.c_void_p, ctypes.c_float]:
    if isinstance(inv_tau, torch.Tensor):
        return _P(inv_tau.data_ptr()), _F(1.0)
    return _P(None), _F(1.0 if inv_tau is None else inv_tau)


def _pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return _P(None if tensor is None else tensor.data_ptr())
