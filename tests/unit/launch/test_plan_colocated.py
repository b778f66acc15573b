"""Trainer and servers in turns on the same GPUs: what each must leave to the other."""

from pathlib import Path

import pytest

from megatron_urlvr.config.loader import load_config
from megatron_urlvr.exit_codes import UnusableInput
from megatron_urlvr.launch.plan.crew import crew_of
from megatron_urlvr.launch.plan.hardware import GIB, GPUS, assume
from megatron_urlvr.launch.plan.plan import Plan, load_model, make_plan
from megatron_urlvr.launch.plan.report import as_json, as_text
from megatron_urlvr.launch.plan.search import search

ROOT = Path(__file__).parents[3]
RECIPE = "configs/recipes/qwen2.5-7b_1node_colocated.yaml"
H100 = GPUS["H100-80GB"]
PARAMETERS = 7_615_616_512
"""Of Qwen2.5-7B."""


@pytest.fixture(autouse=True)
def _from_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def planned(*overrides: str, **assumed: float) -> Plan:
    config = load_config(RECIPE, list(overrides))
    assumptions = assume([f"{name}={value}" for name, value in assumed.items()])
    return make_plan(config, load_model(config), H100, crew_of(config, 8, None), assumptions, built=False)


def test_every_gpu_trains_and_serves_and_is_counted_once():
    plan = planned()
    assert (plan.crew.gpus, plan.crew.trainers, plan.crew.serving, plan.crew.servers) == (8, 8, 8, 8)
    assert as_json(plan)["gpus"] == {"total": 8, "train": 8, "serve": 8, "servers": 8}
    assert as_json(plan)["in_turns"]
    assert "8 x H100-80GB: 8 train, and serve in turns (8 x tp 1)" in as_text(plan)


def test_phases_follow_each_other():
    times = planned().times
    assert times.generate is not None
    assert times.total == pytest.approx(times.generate.seconds + times.score + times.train + times.sync)


def test_servers_have_what_the_trainer_does_not_keep():
    plan = planned()
    assert plan.server is not None
    # 2 bytes of weights a parameter over tp 2, 12 of the optimizer over dp 4 too; 5 GiB of reserve.
    keeps = PARAMETERS / 2 * (2 + 12 / 4) + 5 * GIB
    assert plan.server.trainer == pytest.approx(keeps, rel=0.001)
    assert plan.server.weights == 2 * PARAMETERS
    assert plan.server.kv_cache == pytest.approx(0.6 * H100.memory - 2 * PARAMETERS, abs=2)
    whole = plan.server.weights + plan.server.kv_cache + plan.server.other + plan.server.trainer
    assert whole == pytest.approx(H100.memory, abs=2)
    assert plan.problems == []


def test_an_offloaded_optimizer_visits_for_its_step_and_to_be_saved():
    stays, offloaded = planned(), planned("optim.offload=true", "optim.ema_decay=0.99", host_gb_s=10.0)
    assert stays.server is not None
    assert offloaded.server is not None
    state = PARAMETERS / 2 * 12 / 4
    assert stays.server.trainer == offloaded.server.trainer, "a save may come while servers generate"
    # The optimizer's part of a rank, and the average's, of the masters that it steps; the whole reference.
    assert offloaded.host_bytes == pytest.approx(state + 4 * PARAMETERS / 2 * (1 / 4 + 1), rel=0.001)
    for before, now in zip(stays.ranks, offloaded.ranks, strict=True):
        worst = max(now.update, now.score, now.sync, now.shard.optimizer)
        assert now.peak == now.shard.weights + now.shard.gradients + now.reserve + worst
        assert now.peak < before.peak
    moved = offloaded.times.after_backward["optimizer"] - stays.times.after_backward["optimizer"]
    assert moved == pytest.approx(2 * state / 10e9, rel=0.001)
    assert "score, sync, optim" in as_text(offloaded)


def test_a_share_that_the_trainer_leaves_no_room_for_is_refused_with_the_largest_that_fits():
    plan = planned("servers.pools.policy.mem_fraction=0.75")
    [problem] = plan.problems
    assert "mem_fraction = 0.75 that leaves -2.8 GiB" in problem
    fits = float(problem.rsplit(" ", 1)[1].rstrip("."))
    assert planned(f"servers.pools.policy.mem_fraction={fits}").problems == []
    assert planned(f"servers.pools.policy.mem_fraction={fits + 0.01}").problems != []


def test_what_a_sleeping_server_keeps_is_not_the_trainers():
    peak = max(rank.peak for rank in planned().ranks) / GIB
    free = H100.memory / GIB - peak
    assert not any("pipeline rank" in each for each in planned(sleeping_server_gib=free - 0.1).problems)
    [problem, *_] = planned(sleeping_server_gib=free + 0.1).problems
    assert f"beside the {free + 0.1:.1f} of a sleeping server" in problem


def test_numbers_that_contradict_each_other_are_refused():
    config = load_config(RECIPE)
    with pytest.raises(UnusableInput, match=r"parallel\.dp x tp x pp x cp = 8: all of them train"):
        crew_of(config, 16, None)
    with pytest.raises(UnusableInput, match="servers run on the trainer's GPUs"):
        crew_of(config, 8, 4)


def test_a_search_lets_all_gpus_do_both():
    config = load_config(RECIPE, ["parallel.dp=auto"])
    best = search(config, load_model(config), H100, 8, assume([]))[0].plan
    assert (best.crew.gpus, best.crew.trainers, best.crew.serving) == (8, 8, 8)
    assert best.problems == []
