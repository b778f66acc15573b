"""What ranks hand to each other around the policy: prompts to replicas, groups within one, sums between them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..monitor.audit import Sums, merge
from ..policy.policy import Policy, Weights
from ..rollout.engine import RolloutEngine
from ..rollout.records import group_from_record, group_to_record
from ..types import Group
from .agreement import agreed
from .layout import Layout, broadcast_json, gather_json

T = TypeVar("T")


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from what it is for: `derive_seed(run_seed, "train", step)`."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def my_share(items: Sequence[T], layout: Layout) -> list[T]:
    """This replica's part of `items`: every dp-th, so that sizes differ by one at most and replicas work through the
    items side by side. Mini-batches then hold the same prompts whatever the number of replicas."""
    return list(items[layout.dp_rank :: layout.dp])


def in_order(shares: Sequence[Sequence[T]]) -> list[T]:
    """The items of all replicas' shares, in the order they had before `my_share`."""
    return [share[k] for k in range(max(map(len, shares), default=0)) for share in shares if k < len(share)]


def share_groups(groups: Sequence[Group] | None, layout: Layout) -> list[Group]:
    """The leader's groups, on every rank of its replica, bit for bit. Other ranks pass None."""
    if len(layout.replica_ranks) == 1:
        assert groups is not None
        return list(groups)
    records = None if groups is None else [group_to_record(group) for group in groups]
    received = broadcast_json(records, source=layout.replica_ranks[0], group=layout.replica)
    return list(groups) if groups is not None else [group_from_record(record) for record in received]


def hand_over(
    policy: Policy, engine: RolloutEngine | None, layout: Layout, *, version: int, weights: Weights = "policy"
) -> None:
    """Stream the policy's `weights` to the engine as `version`. Every rank drains the stream; what fails on one rank is
    raised on all: RolloutFailed, Abandoned. An engine that sleeps wakes at the end, when no rank holds on to memory
    that only an update needs."""
    stream = policy.export(weights)
    with agreed(layout):
        if engine is not None:
            engine.begin_update(version)
    with agreed(layout):
        try:
            if engine is not None:
                engine.update(stream)
        finally:
            for _ in stream:
                pass
    if any_rank(engine is not None and engine.shares_memory, layout):
        policy.offload()
    with agreed(layout):
        if engine is not None:
            engine.end_update()
    if engine is not None:
        engine.resume()


def put_to_sleep(policy: Policy, engine: RolloutEngine | None, layout: Layout) -> None:
    """Hand the engine's memory to the policy, on every rank, until weights are handed over. RolloutFailed or Abandoned
    on every rank alike. Called when every replica has the groups that it asked for."""
    with agreed(layout):
        if engine is not None:
            engine.sleep()
    policy.onload()


def gather_from_leaders(value: Any, layout: Layout) -> list[Any]:
    """Every replica's JSON-able value, in replica order, on every rank."""
    if layout.world_size == 1:
        return [value]
    everyone = gather_json(value if layout.is_leader else None, layout.control)
    return [everyone[rank] for rank in layout.leaders]


def merge_sums(sums: Sums, layout: Layout) -> Sums:
    """Metric sums over all replicas; see `monitor.audit`."""
    parts: list[Mapping[str, tuple[float, float]]] = gather_from_leaders(sums, layout)
    return merge(parts)


def largest(value: int, layout: Layout) -> int:
    """The largest of all ranks' values."""
    if layout.world_size == 1:
        return value
    found = torch.tensor(value)
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=layout.control)
    return int(found)


def any_rank(flag: bool, layout: Layout) -> bool:
    """Whether any rank raised its flag."""
    return bool(largest(int(flag), layout))
