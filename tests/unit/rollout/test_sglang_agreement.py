"""Two replicas, one of whose leaders fails: both end alike, and neither waits for the other for ever."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from megatron_urlvr.distributed.agreement import agreed
from megatron_urlvr.distributed.exchange import hand_over, put_to_sleep
from megatron_urlvr.exit_codes import UnusableInput
from megatron_urlvr.rollout.faults import Abandoned, RolloutFailed

PHASES = ("generate", "sleep", "begin", "update", "end")
KINDS = {kind.__name__: kind for kind in (RolloutFailed, Abandoned, UnusableInput)}


class Engine:
    """Fails in one phase."""

    shares_memory = True

    def __init__(self, fails_in: str | None, kind: str) -> None:
        self.fails_in, self.kind = fails_in, kind

    def _maybe(self, phase: str) -> None:
        if phase == self.fails_in:
            raise KINDS[self.kind](f"the leader failed in {phase}")

    def generate(self) -> None:
        self._maybe("generate")

    def sleep(self) -> None:
        self._maybe("sleep")

    def begin_update(self, version: int) -> None:
        self._maybe("begin")

    def update(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        next(weights)
        self._maybe("update")
        for _ in weights:
            pass

    def end_update(self) -> None:
        self._maybe("end")

    def resume(self) -> None:
        pass


CASES = [
    (phase, kind, failing)
    for phase, kind in [
        *((phase, "RolloutFailed") for phase in PHASES),
        ("generate", "Abandoned"),
        ("begin", "UnusableInput"),
    ]
    for failing in (0, 1)
]


def leader(rank: int, store: str, out: str) -> None:
    """One leader's process: what each case ended with goes to a file."""
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    endings = [ending_of(rank, *case) for case in CASES]
    Path(f"{out}{rank}").write_text(json.dumps(endings))
    dist.barrier()
    os._exit(0)  # leaving the group, gloo now and then aborts a process whose peer is gone already


def ending_of(rank: int, phase: str, kind: str, failing: int) -> str:
    layout: Any = SimpleNamespace(world_size=2, control=dist.group.WORLD)
    engine: Any = Engine(phase if rank == failing else None, kind)

    def export(weights: str) -> Iterator[tuple[str, torch.Tensor]]:
        for name in ("a", "b", "c"):  # collective, as the policy's: every rank must drain it
            tensor = torch.ones(2)
            dist.all_reduce(tensor)
            yield name, tensor

    policy: Any = SimpleNamespace(export=export, offload=lambda: None, onload=lambda: None)
    try:
        with agreed(layout):
            engine.generate()
        put_to_sleep(policy, engine, layout)
        hand_over(policy, engine, layout, version=1)
    except (RolloutFailed, Abandoned, UnusableInput) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.fixture(scope="module")
def endings(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, int], set[str]]:
    """What the two leaders ended with in each case. One pair of processes takes all cases: a fork of this one would
    inherit the threads of process groups that other tests made."""
    folder = tmp_path_factory.mktemp("leaders")
    multiprocessing.start_processes(
        leader, (str(folder / "store"), str(folder / "out")), nprocs=2, start_method="spawn"
    )
    each = [json.loads((folder / f"out{rank}").read_text()) for rank in (0, 1)]
    return {case: {each[0][i], each[1][i]} for i, case in enumerate(CASES)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_whichever_leader_fails_in_whichever_phase_both_end_with_the_same_words(
    endings: dict[tuple[str, str, int], set[str]], case: tuple[str, str, int]
) -> None:
    phase, kind, _ = case
    assert endings[case] == {f"{kind}: the leader failed in {phase}"}
