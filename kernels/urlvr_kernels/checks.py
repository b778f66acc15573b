"""Argument checks of the public functions: every refusal is a sentence that begins with the argument's name.

Values on the host (CPU tensors, numbers) are checked here and raise ValueError. Values on a GPU are checked there,
without waiting for it: `torch._assert_async` makes the process fail with the same sentence at its next synchronisation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch

from .device import gemm_dtype, on_cpu, wide_dtype
from .stats import DIFFERENTIABLE, IGNORED, OUTPUTS

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


def require_everywhere(condition: torch.Tensor, sentence: str) -> None:
    """Refuses unless all of `condition` holds; on a GPU asynchronously."""
    if on_cpu(condition):
        _require(bool(condition.all()), sentence)
    else:
        torch._assert_async(condition.all(), sentence)


def check_outputs(
    outputs: Sequence[str], target: torch.Tensor | None, upstream: Mapping[str, torch.Tensor] | None = None
) -> tuple[str, ...]:
    """The outputs as a tuple: known names, none twice, at least one; all that upstream has gradients of."""
    _require(
        not isinstance(outputs, str), f"outputs: {outputs!r} is one string; pass a sequence of names, ({outputs!r},)."
    )
    _require(isinstance(outputs, Iterable), f"outputs: a {type(outputs).__name__}; pass a sequence of names.")
    names = tuple(outputs)
    unknown = [name for name in names if name not in OUTPUTS]
    _require(not unknown, f"outputs: {unknown} are unknown; choose among {', '.join(OUTPUTS)}.")
    _require(len(names) > 0, f"outputs: empty; name at least one of {', '.join(OUTPUTS)}.")
    _require(len(set(names)) == len(names), f"outputs: {names} names a statistic twice; name each once.")
    _require(
        target is not None or "logp" not in names, "target: missing, and outputs asks for logp; pass target ids [T]."
    )
    _require(
        upstream is None or isinstance(upstream, Mapping),
        f"upstream: a {type(upstream).__name__}; pass {{name of a statistic: gradients [T]}}.",
    )
    for name in upstream or ():
        _require(
            name in DIFFERENTIABLE,
            f"upstream: {name!r} carries no gradient; choose among {', '.join(DIFFERENTIABLE)}.",
        )
        _require(name in names, f"upstream: {name!r} is not among outputs={names}; ask for it there.")
    return names


def check_matrix(name: str, value: torch.Tensor, shape: str) -> None:
    """A two-dimensional floating-point tensor with unit stride along its rows' entries."""
    _require(isinstance(value, torch.Tensor), f"{name}: a {type(value).__name__}; pass a tensor {shape}.")
    _require(
        value.dim() == 2, f"{name}: shape {tuple(value.shape)}; it must be {shape} (flatten batch dimensions first)."
    )
    _require(value.dtype in FLOATS, f"{name}: dtype {value.dtype}; it must be float64, float32, bfloat16 or float16.")


def check_same(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor, *, dtype: bool = False) -> None:
    """The same device as `other`, and the same type where asked."""
    _require(
        value.device == other.device,
        f"{name}: on {value.device}, but {other_name} is on {other.device}; move it there.",
    )
    if dtype:
        _require(
            value.dtype == other.dtype,
            f"{name}: dtype {value.dtype}, but {other_name} has {other.dtype}; cast one of them.",
        )


def check_rows(name: str, value: torch.Tensor, rows: int, like_name: str, like: torch.Tensor) -> None:
    """A vector with one entry a row, on the device of `like`."""
    _require(isinstance(value, torch.Tensor), f"{name}: a {type(value).__name__}; pass a tensor [{rows}].")
    _require(
        tuple(value.shape) == (rows,),
        f"{name}: shape {tuple(value.shape)}; it needs one entry for each of the {rows} rows that are read, ({rows},).",
    )
    check_same(name, value, like_name, like)


def check_hidden(hidden: torch.Tensor, wgrad: str, stash_bytes: int, workspace_bytes: int) -> None:
    """The hidden states, budgets, and the way of the weight's gradient: what ranks have alike."""
    check_matrix("hidden", hidden, "[T, H]")
    _require(hidden.shape[1] > 0, "hidden: width 0; it must have at least one column.")
    for name, value in (("stash_bytes", stash_bytes), ("workspace_bytes", workspace_bytes)):
        _require(isinstance(value, int), f"{name}: {value!r}; it must be a whole number of bytes.")
    _require(stash_bytes >= 0, f"stash_bytes: {stash_bytes}; it must be 0 (recompute everything) or more.")
    _require(workspace_bytes > 0, f"workspace_bytes: {workspace_bytes}; it must be positive.")
    _require(wgrad in ("autograd", "main_grad"), f"wgrad: {wgrad!r}; choose autograd or main_grad.")


def check_weight(weight: torch.Tensor, hidden: torch.Tensor, wgrad: str) -> None:
    """This rank's shard of the head, and where its gradient goes."""
    check_matrix("weight", weight, "[V_local, H]")
    check_same("weight", weight, "hidden", hidden, dtype=True)
    _require(
        hidden.shape[1] == weight.shape[1],
        f"weight: shape {tuple(weight.shape)}; its rows must be as wide as those of hidden, {hidden.shape[1]}.",
    )
    if wgrad == "main_grad" and weight.requires_grad:
        main = getattr(weight, "main_grad", None)
        _require(
            isinstance(main, torch.Tensor) and main.shape == weight.shape and main.is_contiguous(),
            "wgrad: 'main_grad', but the weight has no contiguous `main_grad` of its shape; wrap the model in "
            "Megatron's DDP with gradient accumulation fusion, or choose 'autograd'.",
        )
        _require(
            not hasattr(weight, "__fsdp_param__"),
            "wgrad: 'main_grad' does not serve Megatron-FSDP, which makes main_grad on demand; choose 'autograd'.",
        )


def check_parallel(
    sequence_parallel: bool, tp_group: object | None, one_pass_over_ranks: bool, vocab_size: int | None
) -> None:
    """What goes together under tensor parallelism."""
    _require(
        not sequence_parallel or tp_group is not None,
        "sequence_parallel: True without tp_group; pass the group that hidden is sharded over.",
    )
    _require(
        not one_pass_over_ranks or vocab_size is not None,
        "vocab_size: needed with upstream under tensor parallelism, so that all ranks cut the rows into the same "
        "blocks.",
    )


def check_row_index(row_index: torch.Tensor, total: int, hidden: torch.Tensor) -> None:
    """Rows of hidden that exist."""
    _require(
        isinstance(row_index, torch.Tensor) and row_index.dim() == 1 and row_index.dtype == torch.int64,
        "row_index: it must be a vector of int64 row numbers.",
    )
    check_same("row_index", row_index, "hidden", hidden)
    require_everywhere(
        (row_index >= 0) & (row_index < total),
        f"row_index: numbers outside 0 .. {total - 1}, the rows of hidden.",
    )


def resolve_logits_dtype(logits_dtype: torch.dtype | None, hidden: torch.Tensor) -> torch.dtype:
    """The type logits are rounded to."""
    wide = wide_dtype(hidden.dtype)
    if logits_dtype is None:
        return gemm_dtype(hidden)
    _require(
        logits_dtype in (hidden.dtype, wide),
        f"logits_dtype: {logits_dtype}; for hidden states of {hidden.dtype} it can be {hidden.dtype} or {wide}.",
    )
    return logits_dtype


def check_vocab_size(vocab_size: int | None) -> None:
    """The size of the whole vocabulary."""
    _require(
        vocab_size is None or vocab_size > 0,
        f"vocab_size: {vocab_size}; it is the number of real vocabulary entries, 1 or more.",
    )


def check_shard(holder: str, columns: int, vocab_start: int, vocab_size: int | None, parallel: bool) -> int:
    """This rank's columns; returns how many of them are real vocabulary."""
    _require(
        columns > 0, f"{holder}: an empty shard (0 vocabulary rows); every rank needs at least one, padding included."
    )
    _require(vocab_start >= 0, f"vocab_start: {vocab_start}; it is the global id of the first column, 0 or more.")
    _require(
        parallel or vocab_start == 0,
        f"vocab_start: {vocab_start} without tp_group; one rank alone holds the whole vocabulary, which starts at 0.",
    )
    if vocab_size is None:
        return columns
    _require(
        parallel or vocab_size <= columns,
        f"vocab_size: {vocab_size}, but {holder} holds {columns} entries and tp_group is None; pass the group.",
    )
    return min(max(vocab_size - vocab_start, 0), columns)


def check_shards(layout: torch.Tensor, vocab_size: int | None, target: torch.Tensor | None) -> None:
    """The shards of a tensor-parallel group together: every entry of the vocabulary on exactly one rank.

    layout: `[ranks, 4]`, the same on all ranks: a shard's first id, the id behind its last real one, the vocab_size its
    rank was given (0: None), and whether the rank refused its arguments. target `[R]` is held against the size that
    comes of it where vocab_size is None.
    """
    first, end, sizes, refused = layout.unbind(1)
    require_everywhere(
        refused == 0, "tp_group: another of its ranks refused an argument; the error of that rank names it."
    )
    require_everywhere(
        sizes == (vocab_size or 0),
        f"vocab_size: {vocab_size}, but other ranks of tp_group were given another; pass the same on all.",
    )
    # Shards lie side by side if and only if they hold y entries below y, each counted as often as it is held, for
    # every y at which one of them, or the vocabulary, begins or ends.
    border = layout[:, :3].flatten()
    held = (end.minimum(border[:, None]) - first.minimum(border[:, None])).sum(1)
    shards = f" {layout[:, :2].int().tolist()}" if on_cpu(layout) else ""
    require_everywhere(
        held == border,
        f"vocab_start: the shards{shards} of tp_group (first id, id behind the last) overlap, leave a gap or do not "
        f"make up vocab_size={vocab_size}; pass each rank the global id of its first column.",
    )
    if vocab_size is None and target is not None:
        known = f"0 .. {int(end.max()) - 1}" if on_cpu(layout) else "the vocabulary"
        require_everywhere(target < end.max(), _outside(known))


def _outside(limit: str) -> str:
    return f"target: ids outside {limit}; rows to leave out carry {IGNORED}."


def check_target(
    target: torch.Tensor, rows: int, vocab_size: int | None, like_name: str, like: torch.Tensor
) -> torch.Tensor | None:
    """Global ids in range, or -100; `check_shards` looks at the upper end where vocab_size is None.

    Returns the mask of ignored rows; None where there are known to be none (CPUs).
    """
    check_rows("target", target, rows, like_name, like)
    _require(
        target.dtype in (torch.int64, torch.int32),
        f"target: dtype {target.dtype}; token ids must be int64 or int32.",
    )
    sentence = _outside("the vocabulary" if vocab_size is None else f"0 .. {vocab_size - 1}")
    if on_cpu(target) and rows:
        low, high = (int(bound) for bound in target.aminmax())
        _require(vocab_size is None or high < vocab_size, sentence)
        if low >= 0:
            return None
    ignored = target == IGNORED
    allowed = ignored | (target >= 0)
    require_everywhere(allowed if vocab_size is None else allowed & (target < vocab_size), sentence)
    return ignored


def resolve_temperature(
    temperature: float | torch.Tensor, rows: int, wide: torch.dtype, like_name: str, like: torch.Tensor
) -> torch.Tensor | float | None:
    """Inverse temperature: None for 1, a number, or `[R]` in the wide type."""
    _require(
        isinstance(temperature, (int, float, torch.Tensor)),
        f"temperature: a {type(temperature).__name__}; pass a number, or a tensor [{rows}].",
    )
    if isinstance(temperature, torch.Tensor) and temperature.dim() == 0 and not on_cpu(temperature):
        temperature = temperature.expand(rows)  # its value is not looked at
    if isinstance(temperature, torch.Tensor) and temperature.dim() > 0:
        check_rows("temperature", temperature, rows, like_name, like)
        _require(temperature.is_floating_point(), f"temperature: dtype {temperature.dtype}; it must be a float type.")
        require_everywhere(
            (temperature > 0) & (temperature < math.inf),
            "temperature: every entry must be positive and finite (greedy decoding has no distribution to take "
            "statistics of).",
        )
        return temperature.detach().to(wide).reciprocal()
    value = float(temperature)
    _require(
        0 < value < math.inf,
        f"temperature: {value}; it must be positive and finite (greedy decoding has no distribution to take "
        f"statistics of).",
    )
    return None if value == 1.0 else 1.0 / value


def check_upstream(upstream: Mapping[str, torch.Tensor], rows: int, like_name: str, like: torch.Tensor) -> None:
    """Constant gradients, one entry a row."""
    _require(len(upstream) > 0, "upstream: empty; pass {'logp': gradients [T]}, or None for the ordinary form.")
    for name, gradient in upstream.items():
        check_rows(f"upstream[{name!r}]", gradient, rows, like_name, like)
        _require(
            not gradient.requires_grad,
            f"upstream: {name!r} requires grad; the one-pass form takes gradients as constants, so detach it.",
        )
