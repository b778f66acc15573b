"""The arithmetic of a plan, against simulations and against the code that it speaks of."""

from pathlib import Path

import pytest
import torch
import urlvr_kernels
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_urlvr.config.optim import OptimSection
from megatron_urlvr.config.parallel import ParallelSection
from megatron_urlvr.launch.plan import memory
from megatron_urlvr.launch.plan.hardware import GPUS, Assumptions
from megatron_urlvr.launch.plan.memory import ServerMemory, in_flight
from megatron_urlvr.launch.plan.shards import PlannedPolicy
from megatron_urlvr.launch.plan.speed import Trainer, forward_flops, generation
from megatron_urlvr.launch.plan.sync import bucket_ends
from megatron_urlvr.launch.plan.workload import Workload, microbatches
from megatron_urlvr.policy.batch import Row, plan_microbatches
from megatron_urlvr.policy.hf.families import FAMILIES
from megatron_urlvr.policy.hf.folder import read_config
from megatron_urlvr.rollout.weight_sync.buckets import buckets

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 512,
}


def trainer(recompute: str = "none", **parallel: object) -> Trainer:
    section = ParallelSection.model_validate(parallel)
    family = FAMILIES["Qwen2ForCausalLM"]
    policy = PlannedPolicy(SMALL, family, section, 1, torch.bfloat16, recompute, OptimSection(lr=1e-6))
    return Trainer(policy, GPUS["H100-80GB"], Assumptions())


def one_forward_one_backward(stages: int, count: int) -> tuple[float, list[int]]:
    """Makespan (a forward takes 1, a backward 2) and most micro-batches in flight of each stage, by simulation."""
    orders = []
    for rank in range(stages):
        warm = min(count, stages - rank - 1)
        order = [("F", i) for i in range(warm)]
        for i in range(count - warm):
            order += [("F", warm + i), ("B", i)]
        orders.append(order + [("B", i) for i in range(count - warm, count)])
    done: dict[tuple[str, int, int], float] = {}
    clock, flying, most = [0.0] * stages, [0] * stages, [0] * stages
    left = [list(order) for order in orders]
    while any(left):
        for rank in range(stages):
            while left[rank]:
                kind, i = left[rank][0]
                before = rank - 1 if kind == "F" else rank + 1
                needs = ("F", rank, i) if kind == "B" and before == stages else (kind, before, i)
                if 0 <= before < stages or before == stages:
                    if needs not in done:
                        break
                    start = max(clock[rank], done[needs])
                else:
                    start = clock[rank]
                clock[rank] = start + (1 if kind == "F" else 2)
                done[kind, rank, i] = clock[rank]
                flying[rank] += 1 if kind == "F" else -1
                most[rank] = max(most[rank], flying[rank])
                left[rank].pop(0)
    return max(clock), most


@settings(deadline=None, max_examples=30)
@given(stages=st.integers(1, 8), count=st.integers(1, 24))
def test_the_bubble_and_the_micro_batches_in_flight_are_those_of_a_simulated_pipeline(stages: int, count: int):
    makespan, most = one_forward_one_backward(stages, count)
    busy = 3 * count
    assert trainer(pp=stages).bubble(count) == pytest.approx(1 - busy / makespan)
    parallel = ParallelSection(pp=stages)
    assert [in_flight(parallel, rank, count) for rank in range(stages)] == most


@settings(deadline=None, max_examples=50)
@given(rows=st.integers(1, 40), prompt=st.integers(1, 30), response=st.integers(1, 60), budget=st.integers(40, 300))
def test_micro_batches_are_as_many_as_the_policy_packs(rows: int, prompt: int, response: int, budget: int):
    each = [Row(tuple(range(prompt)), [0] * response) for _ in range(rows)]
    packed = plan_microbatches(each, max_tokens=budget, share_prefix=False)
    assert microbatches(rows, prompt + response - 1, budget) == len(packed)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 120))
def test_buckets_end_where_the_weight_sync_ends_them(sizes: list[int], limit: int):
    stream = [(str(i), torch.zeros(size, dtype=torch.uint8)) for i, size in enumerate(sizes)]
    real = [max(int(entry.name) for entry in bucket.entries) for bucket in buckets(stream, limit)]
    assert bucket_ends(sizes, limit) == real


def test_the_head_is_given_the_memory_that_its_kernels_take_by_default():
    assert memory.HEAD_STASH == urlvr_kernels.DEFAULT_STASH_BYTES
    assert memory.HEAD_WORKSPACE == urlvr_kernels.DEFAULT_WORKSPACE_BYTES


def test_flops_are_those_that_torch_counts_in_a_forward_of_transformers(tmp_path):
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import Qwen2Config, Qwen2ForCausalLM

    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(**SMALL, attn_implementation="eager"))
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 100, dtype=torch.int64))
    flops = forward_flops(SMALL, 100)
    # Eager attention computes the whole square; half of it is needed.
    expected = 100 * (4 * (flops.layer + 2 * flops.attention) + flops.head)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("tokens", "teraflops"), [(1602, 719), (1621, 728)])
def test_flops_of_a_70b_model_are_those_that_megatron_bridge_publishes(tokens: int, teraflops: int):
    """Llama 3 70B on DGX H100, sequences of 8192 tokens: tokens and model FLOPs a second of a GPU, in the performance
    summaries of the NeMo containers 25.11 and 26.02."""
    hf = read_config(Path(__file__).parents[3] / "configs/recipes/models/Llama-3.1-70B")
    flops = forward_flops(hf, 8192)
    ours = 3 * (80 * (flops.layer + flops.attention) + flops.head)
    assert ours == pytest.approx(teraflops * 1e12 / tokens, rel=2e-3)


def test_twice_the_servers_take_half_of_what_is_not_overhead():
    work = Workload(4096, 4096, 256, 2048, 4096, 4351, (), (), 1)
    server = ServerMemory(weights=10**10, kv_cache=10**12, kv_token=10**5, other=0)
    no_overhead = Assumptions(decode_step_ms=0)

    def seconds(servers: int) -> float:
        made = generation(
            server, work, GPUS["H100-80GB"], no_overhead,
            servers=servers, tp=1, concurrency=64, parameters=10**9, prompts=512,
        )  # fmt: skip
        return made.seconds

    assert seconds(2) < seconds(1) < 2.2 * seconds(2)


def test_full_recomputation_adds_a_forward_and_interleaving_divides_the_bubble():
    plain, recomputed = trainer(), trainer("full")
    one = plain.microbatch(100, 0, 100, training=True)
    assert recomputed.microbatch(100, 0, 100, training=True) == pytest.approx(4 / 3 * one)
    assert trainer(pp=2, vpp=2).bubble(8) == pytest.approx(0.5 / 8.5)
