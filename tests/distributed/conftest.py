"""Launches groups of processes, as torchrun would, and hands what their ranks saw in each layout to the tests."""

import functools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import CHAIN, CHAIN_OF_EXPERTS, CHAIN_OF_FOUR, hand_on
from layout_cases import Case, Observed, Seen, config_of, make_cases, observe, sampling_config, write_families
from length_cases import SeenLengths, model_of, observe_lengths

from megatron_urlvr.train import main as train

HERE = Path(__file__).parent
TIMEOUT_S = 500
LAUNCHES: list[dict[str, dict[str, Any]]] = [
    {"cp2": {"cp": 2}, "tp2": {"tp": 2}, "tp2_sp": {"tp": 2, "sequence_parallel": True}},
    {"pp2_vpp2": {"pp": 2, "vpp": 2}, "pp2_uneven": {"pp": 2, "stage_layers": [3, 1]}},
    {
        "pp2": {"pp": 2},
        "dp2": {"dp": 2, "overlap_grad_reduce": True},
        "dp2_plain": {"dp": 2, "distributed_optimizer": False},
    },
]
"""Layouts of two processes by name, for each start of them: starting Python costs more than the checks."""
OF_FOUR: dict[str, dict[str, Any]] = {
    "tp2_pp2": {"tp": 2, "pp": 2, "sequence_parallel": True},
    "tp2_dp2": {"tp": 2},
    "cp2_pp2": {"cp": 2, "pp": 2},
    "cp2_tp2": {"cp": 2, "tp": 2, "sequence_parallel": True, "share_prefix": False},
    "pp2_dp2": {"pp": 2, "overlap_grad_reduce": True},
}
"""Layouts of four."""
LENGTHS: list[dict[str, dict[str, Any]]] = [
    {"dp2_ep2": {"dp": 2, "ep": 2}, "cp2_ep2": {"cp": 2, "ep": 2}},
    {"pp2_vpp2": {"pp": 2, "vpp": 2}, "pp2_vpp2_unpadded": {"pp": 2, "vpp": 2}},
    {"pp2": {"pp": 2}, "pp2_unpadded": {"pp": 2}, "dp2": {"dp": 2, "overlap_grad_reduce": True}},
]
"""Layouts of two that train on rows of very different lengths, for each start: a mixture where experts are spread
("ep"), elsewhere the tied model; and what Megatron-Core's pipelines make of micro-batches that are not padded to one
length."""
LENGTHS_OF_FOUR: dict[str, dict[str, Any]] = {
    "dp4": {},
    "pp2_dp2": {"pp": 2, "overlap_grad_reduce": True},
    "tp2_dp2_ep2": {"tp": 2, "ep": 2, "sequence_parallel": True},
}
"""The same of four."""


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    torch.set_num_threads(1)
    return {case.name: case for case in make_cases(tmp_path_factory.mktemp("cases"))}


@pytest.fixture(scope="session")
def alone(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seen]:
    """What one process sees, by case."""
    out = tmp_path_factory.mktemp("alone")
    found = {}
    for name, case in cases.items():
        config = config_of(case, out / f"{name}_run")
        seen = observe(config)
        assert train(config) == 0
        found[name] = Seen([seen], out / f"{name}_run", out / "sampled")
    assert train(sampling_config(case, out / "sampled")) == 0
    return found


@pytest.fixture(scope="session", params=[name for group in LAUNCHES for name in group])
def layout_name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_families(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="session")
def launched(
    cases: dict[str, Case], families: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The folder of what two processes saw in a layout. Layouts of one group are computed at the first one's turn."""
    folders: dict[str, Path] = {}

    def folder_of(name: str) -> Path:
        if name not in folders:
            group = next(group for group in LAUNCHES if name in group)
            out = tmp_path_factory.mktemp("_".join(group))
            chains = {"tied": CHAIN, "qwen3_moe": CHAIN_OF_EXPERTS} if group is LAUNCHES[0] else {}
            lengths = LENGTHS[LAUNCHES.index(group)]
            run_job(out, group, cases, families, chains=chains, processes=2, lengths=lengths, train=True)
            folders.update({each: out / each for each in group})
        return folders[name]

    return folder_of


@pytest.fixture(scope="session")
def four(cases: dict[str, Case], families: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what four processes saw in every layout."""
    out = tmp_path_factory.mktemp("four")
    chains = {"tied": CHAIN_OF_FOUR}
    run_job(out, OF_FOUR, cases, families, chains=chains, processes=4, lengths=LENGTHS_OF_FOUR, train=False)
    return out


def run_job(
    out: Path, layouts: Any, cases: dict[str, Case], families: dict[str, Path], *, processes: int, **more: Any
) -> None:
    """Have processes observe `cases` in `layouts`; what `layout_worker.py` is told besides is in `more`."""
    job = {"layouts": layouts, "cases": [asdict(case) for case in cases.values()], **more}
    job["models"] = models = {"tied": cases["tied"].model, **families}
    for name in more["chains"]:
        hand_on(models[name], out / f"chain_{name}", {})
    (out / "job.json").write_text(json.dumps(job, default=str))
    launch(out, processes=processes)


@pytest.fixture(scope="session")
def together(layout_name: str, cases: dict[str, Case], launched: Callable[[str], Path]) -> dict[str, Seen]:
    """What two processes see in this layout, by case."""
    out = launched(layout_name)
    found = {}
    for name in cases:
        ranks = [torch.load(out / f"{name}_{rank}.pt", weights_only=False) for rank in range(2)]
        found[name] = Seen(ranks, out / f"{name}_run", out / "sampled")
    return found


Chain = tuple[list[Any], list[Any]]


@pytest.fixture(scope="session")
def chain(cases: dict[str, Case], launched: Callable[[str], Path]) -> Chain:
    """What one process, two in one layout after the other, and one again see of one training; and one alone."""
    return ends_of_chain("tied", cases["tied"].model, launched(next(iter(LAUNCHES[0]))).parent)


@pytest.fixture(scope="session")
def chain_of_experts(families: dict[str, Path], launched: Callable[[str], Path]) -> Chain:
    """The same of a mixture of experts."""
    return ends_of_chain("qwen3_moe", families["qwen3_moe"], launched(next(iter(LAUNCHES[0]))).parent)


@pytest.fixture(scope="session")
def chain_of_four(cases: dict[str, Case], four: Path) -> Chain:
    """The same with four."""
    return ends_of_chain("tied", cases["tied"].model, four)


def ends_of_chain(name: str, model: Path, out: Path) -> Chain:
    handed: list[Any] = json.loads((out / f"chain_{name}_0.json").read_text())
    handed.append(hand_on(model, out / f"chain_{name}", {}))
    alone = [hand_on(model, out / f"uninterrupted_{name}", {}) for _ in range(1 + len(handed))]
    return handed, alone[1:]


@pytest.fixture(scope="session", params=OF_FOUR)
def seen_by_four(request: pytest.FixtureRequest, cases: dict[str, Case], four: Path) -> dict[str, list[Observed]]:
    """What each of four processes saw in this layout, by case."""
    return {
        name: [torch.load(four / request.param / f"{name}_{rank}.pt", weights_only=False) for rank in range(4)]
        for name in cases
    }


@pytest.fixture(scope="session")
def family_scores(layout_name: str, launched: Callable[[str], Path]) -> list[dict[str, list[torch.Tensor]]]:
    """Log-probs of every family in this layout, as each of two ranks saw them."""
    return [torch.load(launched(layout_name) / f"families_{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="session")
def lengths_alone(cases: dict[str, Case], families: dict[str, Path]) -> Callable[[str], SeenLengths]:
    """What one process sees of rows of many lengths, with the model of a layout."""
    models = {"tied": cases["tied"].model, **families}
    seen = functools.cache(lambda name: observe_lengths(models[name], {}))
    return lambda layout: seen(model_of(layout))


@pytest.fixture(scope="session")
def lengths_seen(launched: Callable[[str], Path], request: pytest.FixtureRequest) -> Callable[[str], list[SeenLengths]]:
    """What each rank sees of them in a layout."""

    def seen_in(name: str) -> list[SeenLengths]:
        if name in LENGTHS_OF_FOUR:
            out, processes = request.getfixturevalue("four"), 4
        else:
            group = next(layouts for layouts, lengths in zip(LAUNCHES, LENGTHS, strict=True) if name in lengths)
            out, processes = launched(next(iter(group))).parent, 2
        return [torch.load(out / f"lengths_{name}_{rank}.pt", weights_only=False) for rank in range(processes)]

    return seen_in


def launch(out: Path, *, processes: int) -> None:
    """Run the worker on every rank; fails with the output of the ranks that did."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    support = HERE.parent / "support"
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(support), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, str(HERE / "layout_worker.py"), str(out / "job.json"), str(out)]
    ranks, logs = [], []
    for rank in range(processes):
        logs.append(out / f"rank{rank}.log")
        with logs[-1].open("w") as log:
            ranks.append(
                subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stdout=log, stderr=subprocess.STDOUT)
            )
    try:
        for each in ranks:
            each.wait(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        pass
    finally:
        codes = [each.poll() for each in ranks]
        for each in ranks:
            each.kill()
            each.wait()
    if any(codes) or None in codes:
        pytest.fail(
            "\n".join(f"rank {r} ended with {code}:\n{logs[r].read_text()[-4000:]}" for r, code in enumerate(codes))
        )
