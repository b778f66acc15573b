"""Rows of one pass moved to where they are computed, and their statistics back to where they came from.

    rows of each replica ─► their sizes, to all ─► `balance.level` ─► rows that move ─► pass ─► statistics back

Prompts, votes, rewards and advantages belong to replicas, whole groups at a time; only the passes over the model see
rows elsewhere. A pass has the same rows whoever computes them. Ranks in the same place of all replicas exchange what
moves among themselves, over gloo: `Layout.peers`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from ..distributed.layout import Layout, gather_json
from .balance import Item, RowCost, excess, level, load
from .batch import Row

COLUMNS = ("old_logp", "ref_logp", "weight", "held", "correction")
"""What a row may carry for each of its tokens."""


class Spread:
    """Where the rows of one pass are computed. Collective, and the same on all ranks of a replica."""

    def __init__(self, rows: Sequence[Row], layout: Layout, cost: RowCost, *, share_prefix: bool) -> None:
        self.layout, self.own = layout, list(rows)
        self.rows = self.own
        """What this replica computes."""
        self.metrics: dict[str, float] = {}
        """`balance/before`, `balance/after`: the costliest replica's FLOPs over the mean, as rows came and as they are
        computed; `balance/moved`: share of the rows that moved. Empty without replicas."""
        self._moved = 0
        alone = layout.dp == 1
        tables: list[list[list[int]]] = [_sizes(rows)] if alone else gather_json(_sizes(rows), layout.peers)
        self._sizes = [size for table in tables for size in table]
        items, self._homes = _items(tables, cost, share_prefix=share_prefix)
        loads = [load(part, items) for part in self._homes]
        self.flops = sum(loads)
        """Of a forward pass over the rows of all replicas; a prompt that rows of one replica share counts once."""
        if alone:
            return
        self._places = level(self._homes, items)
        pairs = zip(self._homes, self._places, strict=True)
        self._moved = sum(len(set(home) - set(place)) for home, place in pairs)
        if self._moved:
            self.rows = self._exchange()
        self.metrics = {
            "balance/before": excess(loads),
            "balance/after": excess([load(part, items) for part in self._places]),
            "balance/moved": self._moved / len(items) if items else 0.0,
        }

    def returned(self, found: Sequence[torch.Tensor], depth: int) -> list[torch.Tensor]:
        """What was found for the rows computed here, `[depth, response length]` float32 each, for the rows that are
        this replica's own, in their order."""
        if not self._moved:
            return list(found)
        me = self.layout.dp_rank
        at = dict(zip(self._places[me], found, strict=True))
        sent = [[at[i].reshape(-1) for i in self._both(peer, me)] for peer in range(self.layout.dp)]
        words = [[depth * self._sizes[i][1] for i in self._both(me, peer)] for peer in range(self.layout.dp)]
        for peer, pieces in enumerate(self._to_and_fro(sent, [sum(each) for each in words], torch.float32)):
            for i, piece in zip(self._both(me, peer), pieces.split(words[peer]), strict=True):
                at[i] = piece.view(depth, -1)
        return [at[i] for i in self._homes[me]]

    def _both(self, home: int, place: int) -> list[int]:
        """Rows that move from replica `home` to `place`, in order; none within a replica."""
        return [] if home == place else sorted(set(self._homes[home]) & set(self._places[place]))

    def _exchange(self) -> list[Row]:
        """This replica's rows to compute, in the order of all rows."""
        me, replicas = self.layout.dp_rank, range(self.layout.dp)
        first = self._homes[me][0] if self._homes[me] else 0
        sent = [
            [_words(self.own[i - first], with_prompt=fresh) for i, fresh in self._once(self._both(me, peer))]
            for peer in replicas
        ]
        coming = [self._once(self._both(peer, me)) for peer in replicas]
        counts = [sum(_count(self._sizes[i], with_prompt=fresh) for i, fresh in each) for each in coming]
        at = {i: row for i, row in zip(self._homes[me], self.own, strict=True) if i in set(self._places[me])}
        for pieces, each in zip(self._to_and_fro(sent, counts, torch.int32), coming, strict=True):
            prompts: dict[int, tuple[int, ...]] = {}
            lengths = [_count(self._sizes[i], with_prompt=fresh) for i, fresh in each]
            for (i, fresh), words in zip(each, pieces.split(lengths), strict=True):
                at[i] = _row(words, self._sizes[i], prompts, with_prompt=fresh)
        return [at[i] for i in self._places[me]]

    def _once(self, moving: Sequence[int]) -> list[tuple[int, bool]]:
        """Each row with whether its prompt goes along: with the first of those that share it and go the same way."""
        seen: set[int] = set()
        found = []
        for i in moving:
            found.append((i, self._sizes[i][3] not in seen))
            seen.add(self._sizes[i][3])
        return found

    def _to_and_fro(
        self, sent: Sequence[Sequence[torch.Tensor]], counts: Sequence[int], dtype: torch.dtype
    ) -> list[torch.Tensor]:
        """Send what is for each peer, and receive so many elements from each."""
        flat = [torch.cat([torch.zeros(0, dtype=dtype), *pieces]) for pieces in sent]
        received = torch.empty(sum(counts), dtype=dtype)
        dist.all_to_all_single(
            received, torch.cat(flat), list(counts), [len(piece) for piece in flat], group=self.layout.peers
        )
        return list(received.split(list(counts)))


def _sizes(rows: Sequence[Row]) -> list[list[int]]:
    """What others must know of each row: tokens of prompt and response, bits of the columns it carries, and the number
    of its prompt among this replica's."""
    keys: dict[tuple[int, ...], int] = {}
    return [
        [
            len(row.prompt),
            len(row.response),
            sum(1 << k for k, name in enumerate(COLUMNS) if getattr(row, name) is not None),
            keys.setdefault(tuple(row.prompt), len(keys)),
        ]
        for row in rows
    ]


def _items(
    tables: Sequence[Sequence[Sequence[int]]], cost: RowCost, *, share_prefix: bool
) -> tuple[list[Item], list[list[int]]]:
    """Costs of all replicas' rows, numbered replica by replica, and the numbers of each replica's."""
    items: list[Item] = []
    homes: list[list[int]] = []
    for table in tables:
        first = len(items)
        homes.append(list(range(first, first + len(table))))
        # Replicas number their prompts alike: the number of a replica's first row tells them apart.
        items += [cost.item(size[0], size[1], first + size[3], share_prefix=share_prefix) for size in table]
    return items, homes


def _count(size: Sequence[int], *, with_prompt: bool) -> int:
    """Words of 32 bits that a row is sent as."""
    prompt, response, columns, _ = size
    return 2 + (prompt if with_prompt else 0) + response * (1 + columns.bit_count())


def _words(row: Row, *, with_prompt: bool) -> torch.Tensor:
    """A row as int32: its advantage (float64), prompt, response, and columns (float32), bit for bit."""
    pieces = [torch.tensor([row.advantage], dtype=torch.float64).view(torch.int32)]
    if with_prompt:
        pieces.append(torch.tensor(row.prompt, dtype=torch.int32))
    pieces.append(torch.tensor(list(row.response), dtype=torch.int32))
    columns = [column for name in COLUMNS if (column := getattr(row, name)) is not None]
    return torch.cat([*pieces, *(column.float().contiguous().view(torch.int32) for column in columns)])


def _row(words: torch.Tensor, size: Sequence[int], prompts: dict[int, tuple[int, ...]], *, with_prompt: bool) -> Row:
    """The row that `_words` made these of; `prompts` keeps those that came before."""
    prompt, response, columns, key = size
    take: Callable[[int], torch.Tensor] = _reader(words)
    advantage = float(take(2).clone().view(torch.float64))
    if with_prompt:
        prompts[key] = tuple(take(prompt).tolist())
    row = Row(prompts[key], take(response).tolist(), advantage)
    for k, name in enumerate(COLUMNS):
        if columns >> k & 1:
            setattr(row, name, take(response).clone().view(torch.float32))
    return row


def _reader(words: torch.Tensor) -> Callable[[int], torch.Tensor]:
    """Takes the next so many words at each call."""
    position = 0

    def take(count: int) -> torch.Tensor:
        nonlocal position
        position += count
        return words[position - count : position]

    return take
