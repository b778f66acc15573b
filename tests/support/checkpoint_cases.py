"""Checkpoints at any layout: saved while training goes on, refused by a full disk, handed on to another layout."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from full_disk import NO_LIMIT, files_of_at_most
from layout_cases import VOCAB
from tiny_models import random_rows

from megatron_urlvr.config.model import ModelSection
from megatron_urlvr.config.optim import OptimSection
from megatron_urlvr.config.parallel import ParallelSection
from megatron_urlvr.config.root import Config
from megatron_urlvr.distributed.exchange import my_share
from megatron_urlvr.distributed.layout import Layout, gather_json, joined
from megatron_urlvr.exit_codes import UnusableInput
from megatron_urlvr.policy import checkpoint
from megatron_urlvr.policy.batch import Row
from megatron_urlvr.policy.policy import Policy


def check_checkpoint(config: Config, folder: Path) -> None:
    """Save and go on meanwhile; load into a new policy and into the old one and go on: the same bits, moments and EMA
    too, in float32 and in bfloat16. A save that any one rank has no space for is told on all of them, and costs
    nothing."""
    with joined(config.parallel, seed=config.run.seed) as layout:
        for dtype in ("float32", "bfloat16"):
            model = config.model.model_copy(update={"dtype": dtype})
            _check_checkpoint(config.model_copy(update={"model": model}), layout, folder / dtype)


def _check_checkpoint(config: Config, layout: Layout, folder: Path) -> None:
    rows = _plain_rows(layout.dp_rank)

    def make() -> Policy:
        return Policy(config.model, config.parallel, layout, optim=OptimSection(lr=1e-2, ema_decay=0.9))

    policy, loss = make(), Likelihood()
    for _ in range(3):
        policy.update(rows, loss, lr=1e-2)
    saving = checkpoint.Saving(policy, folder, 3, {"step": 3}, keep=1)
    for _ in range(2):
        policy.update(rows, loss, lr=1e-2)
    path = saving.finish()
    expected = _state(policy)
    replicas = gather_json({name: _bits(each) for name, each in expected.items() if "ema/" in name}, layout.peers)
    assert all(each == replicas[0] for each in replicas), "replicas hold other averages"
    if policy.dtype == torch.float32:
        for rank in range(layout.world_size):
            _check_full_disk(policy, folder, rank)
        _check_full_disk_of_export(policy, folder.parent)
    torch.manual_seed(99)
    for other in (make(), policy):
        assert checkpoint.newest_intact(other, folder) == (path, [])
        assert checkpoint.load(other, path) == {"step": 3}
        for _ in range(2):
            other.update(rows, loss, lr=1e-2)
        found = _state(other)
        assert found.keys() == expected.keys()
        different = [name for name in expected if not torch.equal(found[name], expected[name])]
        assert not different, f"after a load these differ: {different}"


def _bits(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def _check_full_disk(policy: Policy, folder: Path, rank: int) -> None:
    """`rank` alone can write nothing; every rank is told, wherever it waits, in the same words."""
    told = ""
    with files_of_at_most(100 if policy.layout.rank == rank else NO_LIMIT):
        try:
            checkpoint.Saving(policy, folder, 4, {"step": 4}, keep=1).finish()
        except checkpoint.CheckpointError as error:
            told = str(error)
    assert told.startswith(f"could not write checkpoint {folder}/step_000004: "), told
    assert told.endswith("checkpoints written before it are intact"), told
    if policy.layout.is_main:
        assert [path.name for path in folder.iterdir()] == ["step_000003"]


def _check_full_disk_of_export(policy: Policy, folder: Path) -> None:
    """The first rank, which writes, has no space; every rank is told, and none waits for it in a gather."""
    told = ""
    with files_of_at_most(100 if policy.layout.is_main else NO_LIMIT):
        try:
            policy.save_hf(folder / "exported")
        except UnusableInput as error:
            told = str(error)
    assert told.startswith(f"{folder}/exported cannot be written ("), told
    assert len(list(policy.export())) > 0


CHAIN: Mapping[str, dict[str, Any]] = {
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "dp2": {"dp": 2},
    "pp2_vpp2": {"pp": 2, "vpp": 2},
    "tp2_again": {"tp": 2, "sequence_parallel": True},
}
"""Layouts of two processes that hand one training on to the next, each by its checkpoint."""
CHAIN_OF_EXPERTS: Mapping[str, dict[str, Any]] = {
    "dp2_ep2": {"dp": 2, "ep": 2},
    "tp2": {"tp": 2, "sequence_parallel": True},
    "dp2_ep2_again": {"dp": 2, "ep": 2},
}
"""The same with a mixture of experts."""
CHAIN_OF_FOUR: Mapping[str, dict[str, Any]] = {
    "tp2_pp2": {"tp": 2, "pp": 2, "sequence_parallel": True},
    "tp2_dp2": {"tp": 2},
    "pp2_dp2": {"pp": 2},
}
"""The same for four."""


def hand_on(model: Path, folder: Path, parallel: Mapping[str, Any], *, steps: int = 2) -> list[dict[str, float]]:
    """Go on from the newest checkpoint in `folder`, saved at whatever layout, for some steps, and save; the metrics of
    each step and sums over the moving average."""
    section = ParallelSection(**parallel, max_tokens_per_microbatch=24)
    optim = OptimSection(lr=3e-3, ema_decay=0.5, weight_decay=0.1)
    found = []
    with joined(section) as layout:
        policy = Policy(ModelSection(path=str(model)), section, layout, optim=optim)
        done = 0
        path, problems = checkpoint.newest_intact(policy, folder)
        assert not problems
        if path is not None:
            done = checkpoint.load(policy, path)["step"]
        rows = random_rows(8, vocab=VOCAB, seed=4)
        for row in rows:
            row.weight = torch.full((len(row.response),), 0.05)
        for _ in range(steps):
            found.append(policy.update(my_share(rows, layout), Likelihood(), lr=3e-3))
        ema = policy.score(rows, frozenset({"logp"}), "ema")
        found.append({"ema": float(sum(stats.get("logp").double().sum() for stats in ema))})
        checkpoint.save(policy, folder, done + steps, {"step": done + steps}, keep=9)
    return found


class Likelihood:
    """The negative log-likelihood of the responses, weighted."""

    needs = frozenset({"logp"})

    def upstream(self, inputs: Any) -> None:
        return None

    def __call__(self, stats: Any, inputs: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return -(stats.get("logp") * inputs.weight).sum(), {}

    def finish(self, sums: Mapping[str, float]) -> dict[str, float]:
        return dict(sums)


def _plain_rows(replica: int) -> list[Row]:
    """Longer ones of the second replica, some of which the first one computes."""
    rows = [Row((1, 2 + replica, 3), [4, 5, 6 + k] * (1 + 4 * replica)) for k in range(3 + replica)]
    for row in rows:
        row.weight = torch.full((len(row.response),), 0.1)
    return rows


def _state(policy: Policy) -> dict[str, torch.Tensor]:
    """Weights, this rank's optimizer state and the EMA."""
    state = {f"weight/{name}": p.detach().clone() for name, p in policy.parameters.items()}
    assert policy.optimizer is not None
    assert policy.ema is not None
    for part in policy.optimizer.parts:
        for i, entry in enumerate(part.optimizer.state.values()):
            state |= {f"optimizer/{i}/{name}": torch.as_tensor(value).clone() for name, value in entry.items()}
    return state | {f"ema/{name}": tensor.clone() for name, tensor in policy.ema.tensors.items()}
