"""One micro-batch as one packed sequence `[1, T]`, and what each of its tokens may look at.

It holds *segments*: stretches of tokens that attend causally to themselves and, where they have one, to a *prefix*
segment. With shared prefixes a prompt is one segment and each of its responses another, so that the prompt's rows are
computed once, however many responses there are. Without, each segment is a whole prompt + response. The last response
token is never an input: nothing is predicted from it.

Under context parallelism every rank packs the same micro-batch and keeps its share of each segment (`Share`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .batch import Row

SHORT = 64
"""Tokens up to which segments are attended to together, whatever their lengths."""


@dataclass(frozen=True)
class Share:
    """What a context-parallel rank computes of each segment: of 2 x `size` equal chunks those numbered `rank` and
    2 x `size` - 1 - `rank`, so that causal attention costs all ranks alike. Transformer Engine cuts sequences so too.
    """

    size: int = 1
    rank: int = 0

    @property
    def multiple(self) -> int:
        """Segments are padded to a multiple of this."""
        return 1 if self.size == 1 else 2 * self.size

    def owners(self, length: int) -> torch.Tensor:
        """`[length]` rank of each token of a segment; `length` is a multiple of `multiple`."""
        chunk = torch.arange(length) // (length // self.multiple)
        return torch.minimum(chunk, self.multiple - 1 - chunk)

    def offsets(self, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For segments of `lengths` `[N]`: this rank's tokens of each, `[N, Q]` offsets in the segment, in order, and
        which entries are there, `[N, Q]` bool."""
        count = (lengths // self.size)[:, None]
        place = torch.arange(int(count.max()))[None]
        if self.size == 1:
            return place.expand(len(lengths), -1), place < count
        chunk = count // 2
        late = (self.multiple - 2 - self.rank) * chunk + place
        return torch.where(place < chunk, self.rank * chunk + place, late), place < count


WHOLE = Share()


@dataclass(frozen=True)
class Segments:
    """Attention structure of a packed sequence, for segments of one kind.

    `gather`: `[N, K]` rows of keys and values (prefix right-aligned, then own tokens; the spare row for padding): rows
    of the ranks' shares laid end to end. `queries`: `[N, Q]` this rank's rows of queries (its last row for padding).
    `mask`: `[N, 1, Q, K]` bool, True where a query may look, or None when it is plain causal. `scatter`: `[this rank's
    rows]` positions in the flattened `[N * Q]`. `rows`: the rank's rows that `scatter` fills, in order.
    """

    gather: torch.Tensor
    queries: torch.Tensor
    mask: torch.Tensor | None
    scatter: torch.Tensor
    rows: torch.Tensor

    def to(self, device: torch.device) -> Segments:
        """A copy on `device`."""
        mask = None if self.mask is None else self.mask.to(device, non_blocking=True)
        tensors = (x.to(device, non_blocking=True) for x in (self.gather, self.queries, self.scatter, self.rows))
        gather, queries, scatter, rows = tensors
        return Segments(gather, queries, mask, scatter, rows)


@dataclass
class PackedBatch:
    """One micro-batch, ready for the model. All tensors are on the policy's device.

    T is the number of rows of this rank's share, r that of the response tokens that they predict.
    """

    length: int
    """Rows of all shares together."""
    tokens: torch.Tensor
    """`[1, T]` int64."""
    positions: torch.Tensor
    """`[T]` int64 position of each token in its own sequence."""
    segments: list[Segments]
    """For this package's attention alone; empty where `pack` was told so."""
    restore: torch.Tensor
    """`[T]` where each packed row's attention output lies in the concatenated outputs of all segments; empty without
    them."""
    cu_seqlens: torch.Tensor | None
    """`[N + 1]` int32 ends of the whole sequences for Transformer Engine; None with shared prefixes."""
    max_seqlen: int
    out_rows: torch.Tensor
    """`[r]` row whose hidden state predicts each of these response tokens, sample by sample."""
    targets: torch.Tensor
    """`[r]` response tokens."""
    own: torch.Tensor | None
    """`[r]` which of the micro-batch's R response tokens they are; None where they are all."""
    lengths: list[int]
    """Response length of each sample of this micro-batch."""
    index: list[int]
    """Index of each sample in the whole batch."""
    columns: dict[str, torch.Tensor] = field(default_factory=dict)
    """`[R]` float32 loss inputs (advantage, weight, old_logp, ref_logp)."""
    upstream: dict[str, torch.Tensor] | None = None
    """`[r]` gradients of the loss with respect to its statistics, where they are known before the forward."""

    def to(self, device: torch.device) -> PackedBatch:
        """This batch on `device`; itself when it is there."""
        if self.tokens.device == device:
            return self
        moved: dict[str, Any] = {
            name: None if value is None else value.to(device, non_blocking=True)
            for name in ("tokens", "positions", "restore", "cu_seqlens", "out_rows", "targets", "own")
            for value in [getattr(self, name)]
        }
        columns = {name: value.to(device, non_blocking=True) for name, value in self.columns.items()}
        return replace(self, **moved, columns=columns, segments=[part.to(device) for part in self.segments])

    def owned(self, values: torch.Tensor) -> torch.Tensor:
        """`[r]` of `values` `[R]`, one for each response token of the micro-batch."""
        return values if self.own is None else values[self.own]


@dataclass(frozen=True)
class _Stretches:
    """Segments of one kind: where each begins, its padded length, and (start, length) of the prefix it looks at."""

    starts: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    prefixes: list[tuple[int, int]] = field(default_factory=list)

    def add(self, start: int, length: int, prefix: tuple[int, int] = (0, 0)) -> None:
        self.starts.append(start)
        self.lengths.append(length)
        self.prefixes.append(prefix)

    def ends(self) -> torch.Tensor:
        """`[N + 1]` int32: 0, and where each segment ends; they follow each other."""
        return torch.tensor([0, *(s + n for s, n in zip(self.starts, self.lengths, strict=True))], dtype=torch.int32)

    def picked(self, which: Sequence[int]) -> _Stretches:
        starts, lengths, prefixes = self.starts, self.lengths, self.prefixes
        return _Stretches([starts[i] for i in which], [lengths[i] for i in which], [prefixes[i] for i in which])


class _Places:
    """Where packed rows lie once they are shared out: in this rank's share, and in all shares laid end to end."""

    def __init__(self, kinds: Sequence[_Stretches], total: int, share: Share) -> None:
        self.share, self.spare = share, total - 1
        self.mine = torch.arange(total)
        """The packed rows of this rank."""
        self._local = self._gathered = self.mine
        if share.size == 1:
            return
        owners = torch.empty(total, dtype=torch.int64)
        for kind in kinds:
            for start, length in zip(kind.starts, kind.lengths, strict=True):
                owners[start : start + length] = share.owners(length)
        self.mine = (owners == share.rank).nonzero()[:, 0]
        self._local = torch.full((total,), -1)
        self._local[self.mine] = torch.arange(len(self.mine))
        self._gathered = torch.empty(total, dtype=torch.int64)
        self._gathered[owners.argsort(stable=True)] = torch.arange(total)

    def local(self, rows: torch.Tensor) -> torch.Tensor:
        """Packed rows as rows of this rank's share, -1 where they are another's."""
        return rows if self.share.size == 1 else self._local[rows]

    def gathered(self, rows: torch.Tensor) -> torch.Tensor:
        """Packed rows as rows of all shares laid end to end."""
        return rows if self.share.size == 1 else self._gathered[rows]


def _segment_tables(stretches: _Stretches, places: _Places) -> list[Segments]:
    """Tables of segments, each padded to its longest segment: longer segments than `SHORT` are kept apart from those of
    less than half their length or so."""
    classes: dict[int, list[int]] = {}
    for i, length in enumerate(stretches.lengths):
        classes.setdefault(max(length, SHORT).bit_length(), []).append(i)
    return [_segment_table(stretches.picked(part), places) for part in classes.values()]


def _segment_table(stretches: _Stretches, places: _Places) -> Segments:
    """Index tables of segments and what they look at."""
    lengths, start = torch.tensor(stretches.lengths), torch.tensor(stretches.starts)[:, None]
    own = torch.arange(int(lengths.max()))[None]
    keys = torch.where(own < lengths[:, None], start + own, places.spare)
    offsets, valid = places.share.offsets(lengths)
    local = places.local(torch.where(valid, start + offsets, places.spare))
    queries = torch.where(valid, local, len(places.mine) - 1)
    prefix = torch.tensor([length for _, length in stretches.prefixes])[:, None]
    longest = int(prefix.max())
    seen: torch.Tensor | None = None
    if places.share.size > 1:
        offsets = torch.where(valid, offsets, 0)
        seen = own[:, None] <= offsets[..., None]
    if longest:
        prefix_start = torch.tensor([place for place, _ in stretches.prefixes])[:, None]
        column = torch.arange(longest)[None] - (longest - prefix)  # right-aligned
        keys = torch.cat([torch.where(column >= 0, prefix_start + column, places.spare), keys], 1)
        even = len({length for _, length in stretches.prefixes}) == 1 and seen is None
        causal = own[:, None] <= own[..., None] if seen is None else seen
        shape = (1 if even else len(lengths), causal.shape[1], longest)
        before = torch.ones(shape, dtype=torch.bool) if even else (column >= 0)[:, None].expand(shape)
        seen = torch.cat([before, causal.expand(shape[0], -1, -1)], 2)
    return Segments(
        gather=places.gathered(keys),
        queries=queries,
        mask=None if seen is None else seen[:, None],
        scatter=valid.reshape(-1).nonzero()[:, 0],
        rows=queries[valid],
    )


@dataclass
class _Sequence:
    """A packed sequence in the making."""

    multiple: int
    """Of which each segment's length is one."""
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    plain: _Stretches = field(default_factory=_Stretches)
    after: _Stretches = field(default_factory=_Stretches)
    """Segments that look at a prefix."""

    def append(self, stretch: Sequence[int], prefix: tuple[int, int] | None = None) -> int:
        """Add a segment, after a (start, length) of this sequence where it has a prefix; returns its first row."""
        start, padding = len(self.tokens), -len(stretch) % self.multiple
        position = 0 if prefix is None else prefix[1]
        self.tokens.extend(stretch)
        self.tokens.extend([0] * padding)
        self.positions.extend(range(position, position + len(stretch) + padding))
        if prefix is None:
            self.plain.add(start, len(stretch) + padding)
        else:
            self.after.add(start, len(stretch) + padding, prefix)
        return start

    def pad(self, total: int) -> None:
        """Fill up to `total` rows. Padding is made of segments too, none longer than the others: every row needs an
        attention output."""
        used = len(self.tokens)
        piece = max(self.plain.lengths, default=total)
        for start in range(used, total, piece):
            self.plain.add(start, min(piece, total - start))
        self.tokens += [0] * (total - used)
        self.positions += range(total - used)


def packed_length(
    rows: Sequence[Row], index: Sequence[int], *, share_prefix: bool, pad_to: int = 1, share: Share = WHOLE
) -> int:
    """Rows of all shares of what `pack` makes of these, unless it is told a greater length."""
    prompts: set[tuple[int, ...]] = set()
    used = 0
    for row in (rows[i] for i in index):
        segments = [len(row.prompt) + len(row.response) - 1]
        if share_prefix:
            segments = [0 if row.prompt in prompts else len(row.prompt), len(row.response) - 1]
            prompts.add(row.prompt)
        used += sum(_rounded(length, share.multiple) for length in segments)
    return _rounded(used + 1, pad_to * share.multiple)


def _rounded(number: int, multiple: int) -> int:
    return number + -number % multiple


def pack(
    rows: Sequence[Row],
    index: Sequence[int],
    *,
    share_prefix: bool,
    pad_to: int = 1,
    length: int = 0,
    share: Share = WHOLE,
    tables: bool = True,
) -> PackedBatch:
    """Pack `rows[i] for i in index` into one sequence, of which this rank keeps its `share`.

    T is padded up to a multiple of `pad_to`, and all shares together to at least `length`, with rows that nothing
    attends to (and to keep one spare row). An empty `index` gives a packed batch of padding alone, with R = 0.

    `tables`: with the `segments` that this package's attention looks at. Under context parallelism they hold an entry
    for each query and key of a segment, so that Transformer Engine, which reads `cu_seqlens` alone, does without.
    """
    whole = _Sequence(share.multiple)
    prompt_at: dict[tuple[int, ...], int] = {}
    out_rows: list[int] = []
    targets: list[int] = []
    for i in index:
        prompt, inputs = rows[i].prompt, list(rows[i].response[:-1])
        if share_prefix:
            if prompt not in prompt_at:
                prompt_at[prompt] = whole.append(prompt)
            start = prompt_at[prompt]
            first = whole.append(inputs, (start, len(prompt))) if inputs else start
        else:
            start = whole.append([*prompt, *inputs])
            first = start + len(prompt)
        out_rows += [start + len(prompt) - 1, *range(first, first + len(inputs))]
        targets += rows[i].response
    whole.pad(_rounded(max(len(whole.tokens) + 1, length), pad_to * share.multiple))
    places = _Places((whole.plain, whole.after), len(whole.tokens), share)
    kinds = (whole.plain, whole.after) if tables else ()
    segments = [table for kind in kinds for table in _segment_tables(kind, places)]
    predicting = places.local(torch.tensor(out_rows, dtype=torch.int64))
    batch = PackedBatch(
        length=len(whole.tokens),
        tokens=torch.tensor(whole.tokens)[None, places.mine],
        positions=torch.tensor(whole.positions)[places.mine],
        segments=segments,
        restore=_restoring(segments, len(places.mine) if tables else 0),
        cu_seqlens=None if share_prefix else whole.plain.ends(),
        max_seqlen=max(whole.plain.lengths),
        out_rows=predicting,
        targets=torch.tensor(targets, dtype=torch.int64),
        own=None if share.size == 1 else (predicting >= 0).nonzero()[:, 0],
        lengths=[len(rows[i].response) for i in index],
        index=list(index),
    )
    return replace(batch, out_rows=batch.owned(predicting), targets=batch.owned(batch.targets))


def _restoring(tables: Sequence[Segments], rows: int) -> torch.Tensor:
    """`[rows]` where each row's attention output lies in the outputs of all tables laid end to end."""
    restore = torch.empty(rows, dtype=torch.int64)
    offset = 0
    for table in tables:
        restore[table.rows] = offset + table.scatter
        offset += table.queries.numel()
    return restore
