"""Even shares of rows that cost differently: over data-parallel replicas, and over a pipeline's micro-batches.

verl, slime and others partition a whole batch anew, by Karmarkar and Karp's differencing. That forgets where rows are
and which of them share a prompt. Here rows stay with their owner, and single ones are moved, or exchanged for others,
from the fullest share to an emptier one while that lowers the fuller of both: it never ends worse than it began.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .hf.families import shape_of

GOOD_ENOUGH = 1 / 256
"""Shares are left alone once the fullest is this close to the mean: every row more that moves has to be sent."""


class Item(NamedTuple):
    """What has to be done for one row: its own work, and its prompt's, once for all rows of that prompt in a share."""

    own: int
    prompt: int
    key: int
    """Which prompt it is."""


@dataclass(frozen=True)
class RowCost:
    """FLOPs of one row's forward pass: two for each weight of a matrix that a token meets, and attention's two products
    over what it sees. A backward pass is twice as much of each, so that shares are the same."""

    token: int
    """Matrices of all layers."""
    head: int
    """The output table, for a response token."""
    pair: int
    """A query and a key, in all layers."""

    @classmethod
    def of(cls, hf: Mapping[str, Any]) -> RowCost:
        """Of a Hugging Face config."""
        shape, layers = shape_of(hf, tp=1), int(hf["num_hidden_layers"])
        q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        ffn = shape.ffn
        if "num_experts_per_tok" in hf:
            ffn = int(hf["num_experts_per_tok"]) * int(hf["moe_intermediate_size"])
        weights = shape.hidden * (2 * q + 2 * kv) + 3 * shape.hidden * ffn
        return cls(2 * layers * weights, 2 * shape.hidden * shape.vocab_size, 4 * layers * q)

    def item(self, prompt: int, response: int, key: int, *, share_prefix: bool) -> Item:
        """Of a row with so many tokens of prompt and response."""
        inputs = response - 1
        first = self.token * prompt + self.pair * (prompt * (prompt + 1) // 2)
        rest = self.token * inputs + self.pair * (inputs * prompt + inputs * (inputs + 1) // 2) + self.head * response
        return Item(rest, first, key) if share_prefix else Item(first + rest, 0, key)


class Shares:
    """Items by share, and what each share costs."""

    def __init__(self, parts: Sequence[Sequence[int]], items: Sequence[Item]) -> None:
        self.items = items
        self.members = [list(part) for part in parts]
        self.prompts = [Counter(items[i].key for i in part) for part in parts]
        self.loads = [load(part, items) for part in parts]

    def entering(self, i: int, share: int, *, leaving: int | None = None) -> int:
        """What item `i` adds to a share that item `leaving` leaves."""
        item = self.items[i]
        there = self.prompts[share][item.key]
        if leaving is not None and self.items[leaving].key == item.key:
            there -= 1
        return item.own + (0 if there else item.prompt)

    def leaving(self, i: int, share: int) -> int:
        """What a share no longer costs without its item `i`."""
        item = self.items[i]
        return item.own + (item.prompt if self.prompts[share][item.key] == 1 else 0)

    def after(self, i: int, high: int, j: int | None, low: int) -> tuple[int, int]:
        """Costs of two shares once `i` has gone from `high` to `low`, and `j`, if any, the other way."""
        here, there = self.loads[high] - self.leaving(i, high), self.loads[low]
        if j is not None:
            here += self.entering(j, high, leaving=i)
            there -= self.leaving(j, low)
        return here, there + self.entering(i, low, leaving=j)

    def best(self, high: int, low: int) -> tuple[int, int | None] | None:
        """The move or exchange that leaves the fuller of both shares emptiest; None where none lowers it."""
        gap = (self.loads[high] - self.loads[low]) // 2
        others = sorted(self.members[low], key=lambda j: (self.items[j].own, j))
        sizes = [self.items[j].own for j in others]
        least, found = self.loads[high], None
        for i in self.members[high]:
            at = bisect_left(sizes, self.items[i].own - gap)
            for j in (None, *others[max(0, at - 1) : at + 1]):
                peak = max(self.after(i, high, j, low))
                if peak < least:
                    least, found = peak, (i, j)
        return found

    def shift(self, i: int, high: int, j: int | None, low: int) -> None:
        """Carry out what `best` found."""
        self.loads[high], self.loads[low] = self.after(i, high, j, low)
        for k, source, target in ((i, high, low), (j, low, high)):
            if k is not None:
                self.members[source].remove(k)
                self.members[target].append(k)
                self.prompts[source][self.items[k].key] -= 1
                self.prompts[target][self.items[k].key] += 1


def load(part: Sequence[int], items: Sequence[Item]) -> int:
    """Cost of a share."""
    prompts = {items[i].key: items[i].prompt for i in part}
    return sum(items[i].own for i in part) + sum(prompts.values())


def level(parts: Sequence[Sequence[int]], items: Sequence[Item]) -> list[list[int]]:
    """`parts`, indices into `items`, evened out; the same everywhere for the same arguments.

    The fullest share ends no fuller than that of `parts`, nor, where no items have a prompt in common, above the mean
    by more than its smallest item. Each part is in ascending order.
    """
    shares = Shares(parts, items)
    for _ in range(8 * len(items)):  # far more than are needed; each makes the fullest share emptier
        high = max(range(len(parts)), key=lambda k: shares.loads[k])
        if shares.loads[high] <= sum(shares.loads) / len(parts) * (1 + GOOD_ENOUGH):
            break
        for low in sorted(range(len(parts)), key=lambda k: shares.loads[k]):
            if shares.loads[low] < shares.loads[high] and (found := shares.best(high, low)):
                shares.shift(found[0], high, found[1], low)
                break
        else:
            break
    return [sorted(part) for part in shares.members]


def excess(loads: Sequence[float]) -> float:
    """The largest over the mean; 1 where there is nothing."""
    return max(loads) * len(loads) / total if (total := sum(loads)) else 1.0
