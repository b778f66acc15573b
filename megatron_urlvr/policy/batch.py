"""What the policy is asked to score or train on: rows, and their packing into micro-batches.

A micro-batch is one packed sequence `[1, T]`. It holds *segments*: stretches of tokens that attend causally to
themselves and, where they have one, to a *prefix* segment. With shared prefixes a prompt is one segment and each of
its responses another, so that the prompt's rows are computed once, however many responses there are. Without, each
segment is a whole prompt + response. The last response token is never an input: nothing is predicted from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .balance import Item, level, load

SHORT = 64
"""Tokens up to which segments are attended to together, whatever their lengths."""


@dataclass
class Row:
    """One response to score or train on."""

    prompt: tuple[int, ...]
    response: Sequence[int]
    advantage: float = 0.0
    old_logp: torch.Tensor | None = None
    """`[L]` float32 log-probs of the behaviour policy; None when the policy itself has not moved since (on-policy)."""
    ref_logp: torch.Tensor | None = None
    """`[L]` float32 log-probs of the reference policy."""
    weight: torch.Tensor | None = None
    """`[L]` float32 share of each token in the global loss."""
    held: torch.Tensor | None = None
    """`[L]` float32, 1 on the tokens that KL-Cov holds; None under another loss."""
    correction: torch.Tensor | None = None
    """`[L]` float32 off-policy weight of each token, a factor of the advantage; None where nothing is corrected."""

    @property
    def tokens(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True)
class Segments:
    """Attention structure of a packed sequence, for segments of one kind.

    `gather`: `[N, K]` rows of keys and values (prefix right-aligned, then own tokens; the spare row for padding).
    `queries`: `[N, Q]` rows of queries (the spare row for padding). `mask`: `[N, 1, Q, K]` bool, True where a query
    may look, or None when it is plain causal. `scatter`: `[sum of lengths]` positions in the flattened `[N * Q]`.
    `rows`: the packed rows that `scatter` fills, in order.
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
    """One micro-batch, ready for the model. All tensors are on the policy's device."""

    tokens: torch.Tensor
    """`[1, T]` int64."""
    positions: torch.Tensor
    """`[T]` int64 position of each token in its own sequence."""
    segments: list[Segments]
    restore: torch.Tensor
    """`[T]` where each packed row's attention output lies in the concatenated outputs of all segments."""
    cu_seqlens: torch.Tensor | None
    """`[N + 1]` int32 sequence ends for Transformer Engine; None with shared prefixes."""
    max_seqlen: int
    out_rows: torch.Tensor
    """`[R]` packed row whose hidden state predicts each response token, sample by sample."""
    targets: torch.Tensor
    """`[R]` response tokens."""
    lengths: list[int]
    """Response length of each sample of this micro-batch."""
    index: list[int]
    """Index of each sample in the whole batch."""
    columns: dict[str, torch.Tensor] = field(default_factory=dict)
    """`[R]` float32 loss inputs (advantage, weight, old_logp, ref_logp)."""
    upstream: dict[str, torch.Tensor] | None = None
    """`[R]` gradients of the loss with respect to its statistics, where they are known before the forward."""

    def to(self, device: torch.device) -> PackedBatch:
        """This batch on `device`; itself when it is there."""
        if self.tokens.device == device:
            return self
        moved: dict[str, Any] = {
            name: None if value is None else value.to(device, non_blocking=True)
            for name in ("tokens", "positions", "restore", "cu_seqlens", "out_rows", "targets")
            for value in [getattr(self, name)]
        }
        columns = {name: value.to(device, non_blocking=True) for name, value in self.columns.items()}
        return replace(self, **moved, columns=columns, segments=[part.to(device) for part in self.segments])


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def plan_microbatches(rows: Sequence[Row], *, max_tokens: int, share_prefix: bool) -> list[list[int]]:
    """Split row indices into micro-batches within a token budget.

    Rows of one prompt stay together while they fit, longest first, so that padding inside attention stays small and a
    shared prompt is computed once. A row longer than the budget gets a micro-batch of its own. Padding (`pack`) comes
    on top. ValueError for a row without prompt or response: nothing would predict its first token, or there would be
    nothing to predict.
    """
    for i, row in enumerate(rows):
        if not row.prompt or not row.response:
            raise ValueError(
                f"row {i} has {_count(len(row.prompt), 'prompt token')} and"
                f" {_count(len(row.response), 'response token')}; it needs at least one of each"
            )
    prompts: dict[tuple[int, ...], list[int]] = {}
    for i, row in enumerate(rows):
        prompts.setdefault(row.prompt, []).append(i)
    groups = sorted(prompts.items(), key=lambda item: -max(len(rows[i].response) for i in item[1]))
    plan: list[list[int]] = []
    used = max_tokens + 1
    for prompt, members in groups:
        charged = False
        for i in sorted(members, key=lambda i: -len(rows[i].response)):
            cost = len(rows[i].response) - 1 + (0 if charged and share_prefix else len(prompt))
            if used + cost > max_tokens:
                plan.append([])
                used, cost = 0, len(rows[i].response) - 1 + len(prompt)
            plan[-1].append(i)
            used += cost
            charged = True
    return plan


def level_microbatches(rows: Sequence[Row], plan: Sequence[Sequence[int]], *, share_prefix: bool) -> list[list[int]]:
    """The same number of micro-batches with the same rows, as even in tokens as they can be made; none longer than the
    longest of `plan`. For pipelines, where all are padded to the longest."""
    return level(plan, _token_items(rows, share_prefix=share_prefix))


def fewer_microbatches(rows: Sequence[Row], plan: Sequence[Sequence[int]], *, share_prefix: bool) -> list[list[int]]:
    """Levelled micro-batches, and as few of them as hold the rows without getting longer: where one row is as long as
    several, the others fill up to its length."""
    items = _token_items(rows, share_prefix=share_prefix)
    parts = level(plan, items)
    longest = max((load(part, items) for part in parts), default=0)
    while len(parts) > 1:
        first, second, *others = sorted(parts, key=lambda part: load(part, items))
        found = level([[*first, *second], *others], items)
        if max(load(part, items) for part in found) > longest:
            break
        parts = found
    return parts


def _token_items(rows: Sequence[Row], *, share_prefix: bool) -> list[Item]:
    keys: dict[tuple[int, ...], int] = {}
    items = []
    for row in rows:
        key, prompt, inputs = keys.setdefault(row.prompt, len(keys)), len(row.prompt), len(row.response) - 1
        items.append(Item(inputs, prompt, key) if share_prefix else Item(prompt + inputs, 0, key))
    return items


def _segment_tables(lengths: list[int], starts: list[int], prefix: list[tuple[int, int]], spare: int) -> list[Segments]:
    """Tables of segments at `starts`, with `lengths`, after prefixes given as (start, length). Each is padded to its
    longest segment: longer segments than `SHORT` are kept apart from those of less than half their length or so."""
    classes: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        classes.setdefault(max(length, SHORT).bit_length(), []).append(i)
    return [
        _segment_table([lengths[i] for i in part], [starts[i] for i in part], [prefix[i] for i in part], spare)
        for part in classes.values()
    ]


def _segment_table(lengths: list[int], starts: list[int], prefix: list[tuple[int, int]], spare: int) -> Segments:
    """Index tables of segments at `starts`, with `lengths`, after prefixes given as (start, length)."""
    longest, longest_prefix = max(lengths), max(length for _, length in prefix)
    count = len(lengths)
    length = torch.tensor(lengths)[:, None]
    own = torch.arange(longest)[None]
    queries = torch.where(own < length, torch.tensor(starts)[:, None] + own, spare)
    if longest_prefix:
        prefix_start = torch.tensor([s for s, _ in prefix])[:, None]
        prefix_length = torch.tensor([n for _, n in prefix])[:, None]
        column = torch.arange(longest_prefix)[None] - (longest_prefix - prefix_length)  # right-aligned
        gather = torch.cat([torch.where(column >= 0, prefix_start + column, spare), queries], 1)
        causal = torch.ones(longest, longest_prefix + longest, dtype=torch.bool).tril(longest_prefix)
        seen = torch.cat([column >= 0, torch.ones(count, longest, dtype=torch.bool)], 1)
        even = len({n for _, n in prefix}) == 1
        mask = causal[None, None] if even else causal[None, None] & seen[:, None, None]
    else:
        gather, mask = queries, None
    valid = (own < length).reshape(-1)
    return Segments(
        gather=gather,
        queries=queries,
        mask=mask,
        scatter=valid.nonzero()[:, 0],
        rows=queries.reshape(-1)[valid],
    )


def pack(
    rows: Sequence[Row], index: Sequence[int], *, share_prefix: bool, pad_to: int = 1, length: int = 0
) -> PackedBatch:
    """Pack `rows[i] for i in index` into one sequence.

    T is padded up to a multiple of `pad_to`, and to at least `length`, with rows that nothing attends to (and to keep
    one spare row). An empty `index` gives a packed batch of padding alone, with R = 0.
    """
    tokens: list[int] = []
    positions: list[int] = []
    prompt_at: dict[tuple[int, ...], int] = {}
    plain: tuple[list[int], list[int]] = ([], [])  # starts, lengths
    after: tuple[list[int], list[int], list[tuple[int, int]]] = ([], [], [])  # starts, lengths, prefixes
    out_rows: list[int] = []
    targets: list[int] = []
    for i in index:
        row = rows[i]
        prompt, inputs = row.prompt, list(row.response[:-1])
        if share_prefix and prompt in prompt_at:
            start = prompt_at[prompt]
        else:
            start = len(tokens)
            prompt_at[prompt] = start
            stretch = list(prompt) if share_prefix else [*prompt, *inputs]
            tokens += stretch
            positions += range(len(stretch))
            plain[0].append(start)
            plain[1].append(len(stretch))
        first = start + len(prompt)
        if share_prefix:
            first = len(tokens)
            if inputs:
                after[0].append(first)
                after[1].append(len(inputs))
                after[2].append((start, len(prompt)))
                tokens += inputs
                positions += range(len(prompt), len(prompt) + len(inputs))
        out_rows.append(start + len(prompt) - 1)
        out_rows += range(first, first + len(inputs))
        targets += row.response
    used = len(tokens)
    total = max(used + 1, length)
    total += -total % pad_to
    tokens += [0] * (total - used)
    positions += range(total - used)
    # Padding is made of segments too, none longer than the others: every row needs an attention output.
    piece = max(plain[1], default=total)
    for start in range(used, total, piece):
        plain[0].append(start)
        plain[1].append(min(piece, total - start))
    tables = _segment_tables(plain[1], plain[0], [(0, 0)] * len(plain[0]), total - 1)
    tables += _segment_tables(after[1], after[0], after[2], total - 1)
    restore = torch.empty(total, dtype=torch.int64)
    offset = 0
    for table in tables:
        restore[table.rows] = offset + table.scatter
        offset += table.queries.numel()
    ends = torch.tensor([0, *(s + n for s, n in zip(*plain, strict=True))], dtype=torch.int32)
    return PackedBatch(
        tokens=torch.tensor(tokens)[None],
        positions=torch.tensor(positions),
        segments=tables,
        restore=restore,
        cu_seqlens=None if share_prefix else ends,
        max_seqlen=max(plain[1]),
        out_rows=torch.tensor(out_rows, dtype=torch.int64),
        targets=torch.tensor(targets, dtype=torch.int64),
        lengths=[len(rows[i].response) for i in index],
        index=list(index),
    )
