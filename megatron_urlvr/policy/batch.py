"""What the policy is asked to score or train on: rows, and how they are parted into micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .balance import Item, level, load


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
