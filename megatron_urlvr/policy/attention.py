"""Core attention and rotary positions for packed micro-batches, in plain torch: any device, shared prefixes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule

from .packing import PackedBatch, Segments

SMALL_SCORES = 1 << 12
"""Attention matrices up to this many entries a head are computed with two matmuls on the CPU: measured 1.8x faster
than torch 2.13's scaled_dot_product_attention at 15 x 22 (forward + backward, 256 segments of 4 heads)."""


@dataclass
class PackedSequence(PackedSeqParams):
    """Carries a packed micro-batch through Megatron's layers, beside the fields Transformer Engine reads."""

    batch: PackedBatch | None = None

    @classmethod
    def of(cls, batch: PackedBatch) -> PackedSequence:
        """Packing parameters of `batch`: `thd` for Transformer Engine, or our own attention's with shared prefixes."""
        if batch.cu_seqlens is None:
            return cls(qkv_format="sbhd", batch=batch)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=batch.cu_seqlens,
            cu_seqlens_kv=batch.cu_seqlens,
            max_seqlen_q=batch.max_seqlen,
            max_seqlen_kv=batch.max_seqlen,
            batch=batch,
        )


class PackedRotaryEmbedding(RotaryEmbedding):
    """Rotary frequencies of the packed positions, `[T, 1, 1, d]`, where Megatron's own count rows from zero.

    `frequencies`: `[d / 2]` angles a position, as the model's family has them.
    """

    def __init__(self, *args: Any, frequencies: torch.Tensor, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.inv_freq: torch.Tensor = frequencies.to(self.inv_freq.device)  # type: ignore[has-type]

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> Any:
        """Hand the packed positions (or, for Transformer Engine, the longest length) to `forward`."""
        packed: PackedSequence = args[4]
        assert packed.batch is not None
        return packed.max_seqlen_q if packed.qkv_format == "thd" else packed.batch.positions

    def forward(self, positions: Any, offset: int = 0, packed_seq: bool = False, cp_group: Any = None) -> torch.Tensor:
        """`positions`: `[T]` int64, or a length, for which Megatron's own table is made."""
        if isinstance(positions, int):
            return self.get_emb(positions, offset)
        inv_freq = self.inv_freq.to(positions.device)
        freqs = torch.outer(positions.to(inv_freq.dtype), inv_freq)
        return torch.cat((freqs, freqs), -1)[:, None, None, :]


class PackedAttention(MegatronModule):
    """softmax(q k^T / sqrt(d)) v over the segments of a packed micro-batch.

    Rows are gathered into `[N, Q]` tables of segments, attended, and scattered back; everything outside attention
    works on packed rows without padding. Memory: the gathered keys and values, `N * K * 2 g d` elements.

    Under context parallelism queries are this rank's, and keys and values come from all of its group: one all-gather
    forward, one reduce-scatter backward.
    """

    def __init__(self, config: Any, layer_number: int, attn_mask_type: Any, attention_type: str, **kwargs: Any) -> None:
        super().__init__(config=config)
        self.scale = kwargs.get("softmax_scale") or 1 / math.sqrt(config.kv_channels)
        self.context = kwargs["pg_collection"].cp

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        /,
        *,
        packed_seq_params: PackedSequence,
        attn_mask_type: Any = None,
        attention_bias: Any = None,
    ) -> torch.Tensor:
        """query `[T, 1, h, d]`, key and value `[T, 1, g, d]` (or without the unit axis) -> `[T, 1, h * d]`. T: this
        rank's rows."""
        batch = packed_seq_params.batch
        assert batch is not None
        heads, width = query.shape[-2:]
        q = query.reshape(query.shape[0], -1)
        kv = torch.cat((key.reshape(key.shape[0], -1), value.reshape(value.shape[0], -1)), -1)
        if self.context.size() > 1:
            kv = gather_from_sequence_parallel_region(kv, group=self.context)
        outputs = [self._attend(q, kv, table, heads, width) for table in batch.segments]
        # F.embedding is a row gather whose backward is a fast scatter-add.
        packed = F.embedding(batch.restore, torch.cat(outputs))
        return packed.unsqueeze(1)

    def _attend(self, q: torch.Tensor, kv: torch.Tensor, table: Segments, heads: int, width: int) -> torch.Tensor:
        count, longest = table.queries.shape
        queries = F.embedding(table.queries, q).view(count, longest, heads, width).transpose(1, 2)
        pairs = F.embedding(table.gather, kv).view(count, table.gather.shape[1], 2, -1, width)
        keys, values = pairs[:, :, 0].transpose(1, 2), pairs[:, :, 1].transpose(1, 2)
        if queries.device.type == "cpu" and longest * keys.shape[2] <= SMALL_SCORES:
            out = _two_matmuls(queries, keys, values, table.mask, self.scale)
        else:
            out = F.scaled_dot_product_attention(
                queries,
                keys,
                values,
                attn_mask=table.mask,
                is_causal=table.mask is None and longest > 1,
                scale=self.scale,
                enable_gqa=keys.shape[1] != heads,
            )
        return out.transpose(1, 2).reshape(count * longest, heads * width)


def _two_matmuls(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Attention as two batched matmuls; q `[N, h, Q, d]`, k and v `[N, g, K, d]`."""
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -torch.inf)
    scores = torch.matmul(q * scale, k.transpose(-1, -2)) + bias
    return torch.matmul(scores.softmax(-1), v)
