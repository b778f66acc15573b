"""Ranks under srun: Slurm's variables as torchrun's, and a meeting without an agreed port."""

import datetime
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_urlvr.distributed.ranks import RankMissing, adopt_srun, meet, must_meet

STEP = {
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURMD_NODENAME": "localhost",
}
SOON = datetime.timedelta(seconds=0.5)


def test_a_task_of_srun_is_a_rank():
    environment = dict(STEP)
    adopt_srun(environment)
    assert {name: environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")} == {
        "RANK": "3",
        "WORLD_SIZE": "5",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
    }
    assert must_meet(environment)


@pytest.mark.parametrize(("node", "expected"), [("0", "2"), ("1", "2"), ("2", "1")])
def test_nodes_may_have_different_numbers_of_tasks(node, expected):
    environment = STEP | {"SLURM_NODEID": node}
    adopt_srun(environment)
    assert environment["LOCAL_WORLD_SIZE"] == expected


def test_torchrun_inside_of_a_step_has_the_last_word():
    environment = STEP | {"RANK": "0", "WORLD_SIZE": "8", "MASTER_ADDR": "node1"}
    before = dict(environment)
    adopt_srun(environment)
    assert environment == before
    assert not must_meet(environment)


def test_a_batch_script_is_no_rank():
    environment = {name: value for name, value in STEP.items() if name != "SLURM_STEP_ID"}
    adopt_srun(environment)
    assert "RANK" not in environment
    assert not must_meet(environment)


def ranks(world: int) -> list[dict[str, str]]:
    return [STEP | {"RANK": str(rank), "WORLD_SIZE": str(world)} for rank in range(world)]


def test_ranks_meet_at_the_address_that_the_first_one_left(tmp_path: Path):
    with ThreadPoolExecutor(3) as threads:
        late = [threads.submit(meet, tmp_path, environment) for environment in ranks(3)[:0:-1]]
        first = meet(tmp_path, ranks(3)[0])
        first.set("said", "hello")
        assert [store.result().get("said") for store in late] == [b"hello", b"hello"]
    assert list(tmp_path.iterdir()) == [], "the address is of no use any more"


def test_the_address_of_a_killed_start_is_not_taken_for_this_one(tmp_path: Path):
    (tmp_path / "17.0.0.json").write_text('{"host": "localhost", "port": 1}')
    with ThreadPoolExecutor(1) as threads:
        again = [environment | {"SLURM_RESTART_COUNT": "1"} for environment in ranks(2)]
        other = threads.submit(meet, tmp_path, again[1])
        first = meet(tmp_path, again[0])  # the store lives as long as this object
        first.set("said", "again")
        assert other.result().get("said") == b"again"


def test_a_rank_that_never_comes_is_named_in_a_sentence(tmp_path: Path):
    with pytest.raises(RankMissing, match="rank 0 has not left its address"):
        meet(tmp_path, ranks(2)[1], timeout=SOON)
    with pytest.raises(RankMissing, match=r"not all 2 ranks of 17\.0\.0 came together within 0\.5 s"):
        meet(tmp_path, ranks(2)[0], timeout=SOON)
    assert list(tmp_path.iterdir()) == []
