"""The policy: one object on every rank; every method is collective.

    rows ─► plan_microbatches ─► pack ─► Megatron's forward_backward_func ─► statistics head ─► TokenStats / loss

Normalisers are global and known before the first micro-batch (each row carries its tokens' weights), so that nothing
is rescaled after a forward: gradients are plain sums over micro-batches and data-parallel ranks.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import tee
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from safetensors import SafetensorError

from ..algorithms.losses import LossInputs
from ..config.model import ModelSection
from ..config.optim import OptimSection
from ..config.parallel import ParallelSection
from ..distributed.agreement import agreed
from ..distributed.layout import Layout, broadcast_json
from ..exit_codes import UnusableInput
from ..types import TokenStats
from .attention import PackedSequence
from .average import MovingAverage
from .balance import RowCost
from .batch import Row, fewer_microbatches, level_microbatches, plan_microbatches
from .hf.families import family_of
from .hf.folder import read_config, write_folder
from .model import FP8_ROWS, Head, build_chunks, has_transformer_engine, own_attention, parameters_of
from .optimizer import NonFiniteError, PolicyOptimizer, wrap
from .packing import PackedBatch, Share, pack, packed_length
from .spread import Spread
from .weights import Shadow, WeightMap

Weights = Literal["policy", "reference", "ema"]


class Loss(Protocol):
    """What `update` minimises: a scalar sum over the response tokens of one micro-batch, and metric sums."""

    @property
    def needs(self) -> frozenset[str]: ...

    def __call__(self, stats: TokenStats, inputs: LossInputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]: ...

    def upstream(self, inputs: LossInputs) -> dict[str, torch.Tensor] | None: ...

    def finish(self, sums: Mapping[str, float]) -> dict[str, float]: ...


class Policy:
    """A Megatron-Core policy made from a Hugging Face folder."""

    def __init__(
        self,
        model: ModelSection,
        parallel: ParallelSection,
        layout: Layout,
        *,
        optim: OptimSection | None = None,
        temperature: float = 1.0,
        real_vocab: int | None = None,
        keep_reference: bool = False,
        load_weights: bool = True,
    ) -> None:
        """`temperature` divides the logits of every statistic; `real_vocab` masks the vocabulary further than the HF
        config does. Without `optim` the policy can only score. UnusableInput for a folder that cannot be used."""
        self.folder = Path(model.path)
        self.layout = layout
        self.hf = read_config(model.path)
        family = family_of(self.hf, model.path)
        self.temperature = temperature
        self.max_tokens = parallel.max_tokens_per_microbatch
        if model.fp8 != "none" and not has_transformer_engine():
            raise UnusableInput(
                f"model.fp8 = {model.fp8!r} needs Transformer Engine, which is not installed here or sees no GPU: "
                "install it (docs/gpu.md), or set model.fp8=none"
            )
        self.pad_to = layout.tp * (1 if model.fp8 == "none" else FP8_ROWS)
        self.share = Share(layout.cp, layout.cp_rank)
        self.dtype = _dtype(model.dtype, layout.device)
        self.share_prefix = _share_prefix(parallel, self.dtype)
        self.cost = RowCost.of(self.hf)
        distributed = parallel.distributed_optimizer
        self.chunks = build_chunks(
            self.hf,
            family,
            parallel,
            layout,
            dtype=self.dtype,
            recompute=model.recompute,
            share_prefix=self.share_prefix,
            real_vocab=real_vocab or int(self.hf["vocab_size"]),
            fp8=model.fp8,
        )
        """The model: its parts of this rank, one or (interleaved stages) several, in the order of their layers."""
        self.parameters = parameters_of(self.chunks)
        self.weights = WeightMap(self.chunks, family, self.hf, layout)
        if load_weights:
            self.weights.load(model.path)
        self.reference = Shadow(self.parameters) if keep_reference else None
        self.ema: MovingAverage | None = None
        self.optimizer: PolicyOptimizer | None = None
        self.trained: list[Any] = list(self.chunks)
        if optim is not None:
            overlap = parallel.overlap_grad_reduce
            self.trained = [wrap(chunk, distributed=distributed, overlap=overlap) for chunk in self.chunks]
            if overlap:  # reduced once, with the last micro-batch
                waiting = [chunk.no_sync for chunk in self.trained]
                self.chunks[0].config.no_sync_func = waiting if len(waiting) > 1 else waiting[0]
            self.optimizer = PolicyOptimizer(optim, self.trained, distributed=distributed)
            if optim.ema_decay:
                self.ema = MovingAverage(self.parameters, self.optimizer, decay=optim.ema_decay)
            self.optimizer.park()
        # The loss is normalised already: finish the gradient reduction, divide by nothing.
        self.chunks[0].config.finalize_model_grads_func = lambda model, num_tokens, **kwargs: finalize_model_grads(
            model, None, **kwargs
        )

    # -- scoring ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(
        self,
        rows: Sequence[Row],
        want: frozenset[str],
        weights: Weights = "policy",
        *,
        temperature: float | None = None,
    ) -> list[TokenStats]:
        """Statistics `want` of every response token, in the order of `rows`, on every rank of the replica (CPU).

        `temperature` replaces the policy's own.

        Independent of micro-batching and layout up to rounding; the same bits on all ranks of a replica.
        """
        outputs = tuple(sorted(want))
        spread = self._spread(rows)
        self._train(False)
        with self._using(weights):
            plan, found = self._run(spread.rows, Head(outputs, temperature or self.temperature), loss=None)
        self._train(True)
        count = sum(len(row.response) for row in spread.rows)
        table = torch.empty(len(outputs), count, device=self.layout.device)
        order = [i for part in plan for i in part]
        if found:
            table = torch.cat(found, 1)
        if self.layout.pp > 1:
            dist.broadcast(table, self.layout.last_stage_rank, group=self.layout.pipeline)
        columns = table.cpu().split([len(spread.rows[i].response) for i in order], 1)
        computed = [part for _, part in sorted(zip(order, columns, strict=True), key=lambda pair: pair[0])]
        return [
            TokenStats(**{name: part[k] for k, name in enumerate(outputs)})
            for part in spread.returned(computed, len(outputs))
        ]

    def _spread(self, rows: Sequence[Row]) -> Spread:
        return Spread(rows, self.layout, self.cost, share_prefix=self.share_prefix)

    def _train(self, mode: bool) -> None:
        for chunk in self.chunks:
            chunk.train(mode)

    @contextlib.contextmanager
    def _using(self, weights: Weights) -> Iterator[None]:
        if weights == "policy":
            yield
            return
        shadow = self.reference if weights == "reference" else self.ema
        if shadow is None:
            raise ValueError(f"the policy keeps no {weights} weights; build it with them to score under them")
        with shadow.swapped_into(self.parameters):
            yield

    # -- training -----------------------------------------------------------------------------------------------------

    def update(self, rows: Sequence[Row], loss: Loss, *, lr: float) -> dict[str, float]:
        """One optimizer step on `rows`, this replica's share of a mini-batch. Returns global metrics.

        Every row carries its advantage and its tokens' weights in the global loss. Raises NonFiniteError, with
        weights untouched, when loss or gradient is not finite.
        """
        assert self.optimizer is not None, "this policy was built without an optimizer"
        self.onload()
        for chunk in self.trained:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        outputs = tuple(sorted(loss.needs | {"logp", "entropy"}))
        spread = self._spread(rows)
        _, found = self._run(spread.rows, Head(outputs, self.temperature), loss=loss)
        metrics = loss.finish(self._reduce(found)) | spread.metrics
        if not math.isfinite(metrics["train/loss"]):
            raise NonFiniteError(f"the loss is {metrics['train/loss']}")
        with self.optimizer.resident():
            metrics["train/grad_norm"] = self.optimizer.step(lr)
            if self.ema is not None:
                self.ema.track()
        metrics["train/lr"] = lr
        metrics["train/tflop"] = 3 * spread.flops / 1e12
        return metrics

    def _reduce(self, found: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        """Sum metric sums over micro-batches and replicas; the last stage hands them to the others."""
        names = sorted(found[0]) if found else []
        sums = (
            torch.stack([torch.stack([part[name].double() for part in found]).sum() for name in names])
            if found
            else None
        )
        if self.layout.pp > 1:
            last = self.layout.replica_ranks[-1]
            names = broadcast_json(names, source=last, group=self.layout.replica)
            sums = torch.zeros(len(names), dtype=torch.float64) if sums is None else sums.cpu()
            dist.broadcast(sums, last, group=self.layout.replica)
        assert sums is not None
        if self.layout.dp > 1:
            sums = sums.cpu()
            if not self.layout.is_leader:  # all ranks of a replica have the same sums
                sums.zero_()
            dist.all_reduce(sums, group=self.layout.control)
        return dict(zip(names, sums.tolist(), strict=True))

    # -- the shared forward / backward --------------------------------------------------------------------------------

    def _run(self, rows: Sequence[Row], head: Head, *, loss: Loss | None) -> tuple[list[list[int]], list[Any]]:
        """Run all micro-batches of `rows`; returns the plan and what the last stage collected for each."""
        layout = self.layout
        plan = plan_microbatches(rows, max_tokens=self.max_tokens, share_prefix=self.share_prefix)
        if layout.pp > 1:
            plan = fewer_microbatches(rows, plan, share_prefix=self.share_prefix)
        if layout.dp > 1:
            most = torch.tensor(len(plan))
            dist.all_reduce(most, op=dist.ReduceOp.MAX, group=layout.control)
            plan += [[] for _ in range(int(most) - len(plan))]
        plan = plan or [[]]
        if len(self.chunks) > 1:  # Megatron's interleaved schedule takes micro-batches in groups of pp
            plan += [[] for _ in range(-len(plan) % layout.pp)]
        if layout.pp > 1:
            plan = level_microbatches(rows, plan, share_prefix=self.share_prefix)
        packing: Any = {"share_prefix": self.share_prefix, "pad_to": self.pad_to, "share": self.share}
        # Stages exchange activations of one agreed shape: shorter micro-batches are padded to the longest.
        lengths = [packed_length(rows, part, **packing) for part in plan]
        length = max(lengths) if layout.pp > 1 else 0
        # Packed one by one, as they are asked for: the device works on one while the next is made.
        tables = own_attention(self.share_prefix, self.dtype)
        packed = (pack(rows, part, length=length, tables=tables, **packing) for part in plan)
        batches = tee(packed, len(self.chunks))
        for chunk in self.chunks:
            chunk.head = head
        collected = get_forward_backward_func()(
            forward_step_func=partial(self._forward, rows, loss),
            data_iterator=list(batches),
            model=list(self.trained if loss is not None else self.chunks),
            num_microbatches=len(plan),
            seq_length=max(lengths),
            micro_batch_size=1,
            forward_only=loss is None,
            collect_non_loss_data=loss is None,
        )
        return plan, collected

    def _forward(self, rows: Sequence[Row], loss: Loss | None, batches: Iterator[PackedBatch], model: Any) -> Any:
        """Megatron's forward step: the model's output and the function that makes a loss of it."""
        batch = next(batches)
        if loss is not None:
            batch.columns = _columns(rows, batch.index)
        batch = batch.to(self.layout.device)
        if loss is not None and (upstream := loss.upstream(_inputs(batch))) is not None:
            batch.upstream = {name: batch.owned(gradient) for name, gradient in upstream.items()}
        output = model(batch.tokens, None, None, packed_seq_params=PackedSequence.of(batch))
        if loss is not None:
            return output, partial(_loss, loss, batch)
        return (output if isinstance(output, torch.Tensor) else _table(output)), _kept

    # -- memory for others --------------------------------------------------------------------------------------------

    def offload(self) -> None:
        """Give the memory that updates alone need to whoever shares the device, until `onload`: gradient buffers,
        4 bytes for each of this rank's parameters, which hold nothing between updates.

        Weights stay, for saving and snapshots; masters and moments go with `optim.offload`.
        """
        on_gpu = self.layout.device.type == "cuda"
        if self.optimizer is not None:
            for chunk in self.trained:
                chunk.offload_grad_buffers(synchronize=on_gpu, empty_cache=False)
        if on_gpu:
            torch.cuda.empty_cache()

    def onload(self) -> None:
        """Take the memory again that `offload` gave away; nothing where it did not."""
        if self.optimizer is not None:
            for chunk in self.trained:
                chunk.restore_grad_buffers(synchronize=False)

    # -- weights ------------------------------------------------------------------------------------------------------

    def export(self, weights: Weights = "policy") -> Iterator[tuple[str, torch.Tensor]]:
        """Stream of (Hugging Face name, whole tensor) of `weights`; every rank must drain it."""
        with self._using(weights):
            yield from self.weights.export()

    def save_hf(self, folder: Path, *, tokenizer_from: Path | None = None) -> None:
        """Write the weights as a Hugging Face folder (by rank 0; collective). UnusableInput, on every rank, when it
        cannot be written."""
        stream = self.export()
        with agreed(self.layout):
            try:
                if self.layout.is_main:
                    write_folder(folder, stream, config=self.hf, tokenizer_from=tokenizer_from or self.folder)
            except (OSError, SafetensorError) as error:
                raise UnusableInput(
                    f"{folder} cannot be written ({error}): make room, or choose another place"
                ) from error
            finally:
                for _ in stream:  # the other ranks gather the rest of it, whatever happened here
                    pass


def _kept(table: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
    return table


def _table(stats: Any) -> torch.Tensor:
    """Scoring: the asked-for statistics of one micro-batch, `[K, R]` float32, in the order of their names."""
    present = [getattr(stats, name) for name in sorted(vars(stats)) if getattr(stats, name) is not None]
    return torch.stack(present)


def _loss(loss: Loss, batch: PackedBatch, stats: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Training: Megatron's three-tuple of loss, token count and things to report."""
    own = TokenStats(**{name: value for name, value in vars(stats).items() if name in TokenStats.__dataclass_fields__})
    total, metrics = loss(own, _inputs(batch))
    report = {name: value.detach().clone() for name, value in metrics.items()}
    report["train/loss"] = total.detach().clone()
    # Where the head was told the gradient, it has made it already: its own scalar carries it, with another value.
    total = total if stats.loss is None else stats.loss
    return total, torch.tensor(len(batch.targets), dtype=torch.int), report


def _inputs(batch: PackedBatch) -> LossInputs:
    columns = batch.columns
    return LossInputs(
        advantage=columns["advantage"],
        weight=columns["weight"],
        old_logp=columns.get("old_logp"),
        ref_logp=columns.get("ref_logp"),
        lengths=batch.lengths,
        held=columns.get("held"),
    )


def _columns(rows: Sequence[Row], index: Sequence[int]) -> dict[str, torch.Tensor]:
    """Loss inputs of a micro-batch, response tokens end to end; `old_logp` and `ref_logp` where all rows have them."""
    picked = [rows[i] for i in index]
    if not picked:
        empty = torch.zeros(0)
        names = [
            "advantage",
            "weight",
            *(n for n in ("old_logp", "ref_logp", "held") if rows and getattr(rows[0], n) is not None),
        ]
        return dict.fromkeys(names, empty)
    lengths = torch.tensor([len(row.response) for row in picked])
    columns = {"advantage": torch.tensor([row.advantage for row in picked]).repeat_interleave(lengths)}
    for name in ("weight", "old_logp", "ref_logp", "held"):
        values = [getattr(row, name) for row in picked]
        if all(value is not None for value in values):
            columns[name] = torch.cat(values)
        elif any(value is not None for value in values) or name == "weight":
            raise ValueError(f"rows of one mini-batch must all carry {name!r}, or none of them")
    if any(row.correction is not None for row in picked):
        columns["advantage"] *= torch.cat(
            [torch.ones(len(row.response)) if row.correction is None else row.correction for row in picked]
        )
    return columns


def _share_prefix(parallel: ParallelSection, dtype: torch.dtype) -> bool:
    """Shared prefixes need this package's attention; Transformer Engine's is taken instead where it can be."""
    return own_attention(False, dtype) if parallel.share_prefix == "auto" else parallel.share_prefix


def _dtype(wanted: str, device: torch.device) -> torch.dtype:
    if wanted == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, wanted)


__all__ = ["Loss", "NonFiniteError", "Policy", "Weights"]
