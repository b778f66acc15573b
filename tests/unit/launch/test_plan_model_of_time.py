"""The arithmetic of a plan, against simulations and against the code that it speaks of."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import urlvr_kernels
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_urlvr.config.optim import OptimSection
from megatron_urlvr.config.parallel import ParallelSection
from megatron_urlvr.launch.plan import memory
from megatron_urlvr.launch.plan.generate import Fleet, Job, generation
from megatron_urlvr.launch.plan.hardware import GPUS, Assumptions
from megatron_urlvr.launch.plan.memory import ServerMemory, in_flight
from megatron_urlvr.launch.plan.mixture import Mixture
from megatron_urlvr.launch.plan.shards import PlannedPolicy, Shard
from megatron_urlvr.launch.plan.speed import Trainer, forward_flops
from megatron_urlvr.launch.plan.sync import bucket_ends
from megatron_urlvr.launch.plan.workload import microbatches
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


EXPERTS = {**SMALL, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16}


def trainer(
    recompute: str = "none", *, hf: dict[str, int] = SMALL, imbalance: float = 1.0, **parallel: object
) -> Trainer:
    section = ParallelSection.model_validate(parallel)
    family = FAMILIES["Qwen3MoeForCausalLM" if hf is EXPERTS else "Qwen2ForCausalLM"]
    policy = PlannedPolicy(hf, family, section, 4, torch.bfloat16, recompute, OptimSection(lr=1e-6), imbalance)
    return Trainer(policy, GPUS["H100-80GB"], Assumptions(link_efficiency=1))


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


def test_flops_of_a_mixture_are_those_of_the_experts_that_a_token_goes_to():
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    slow = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**EXPERTS, **slow))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.arange(100)[None])
    flops = forward_flops(EXPERTS, 100)
    expected = 100 * (4 * (flops.layer + 2 * flops.attention) + flops.head)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("experts", "chosen", "tokens"), [(4, 2, 1), (4, 2, 2), (5, 1, 3), (3, 3, 1)])
def test_the_experts_that_a_batch_touches_are_those_of_every_combination_of_choices(experts, chosen, tokens):
    choices = [set(each) for each in itertools.combinations(range(experts), chosen)]
    unions = [len(set().union(*each)) for each in itertools.product(choices, repeat=tokens)]
    mixture = Mixture(1, experts, chosen, 1)
    assert mixture.touched(tokens) == pytest.approx(sum(unions) / len(unions) / experts)


def test_context_parallel_ranks_share_the_work_and_exchange_keys_and_values():
    nvlink = 450e9
    one, two = trainer(), trainer(cp=2)
    sent = 2 * 32 * 2 * 1000 / 2  # keys and values of 32 channels in bfloat16, of the other rank's half of the tokens
    forward = two.microbatch(1000, 100, 1000, training=False)
    assert forward == pytest.approx(one.microbatch(1000, 100, 1000, training=False) / 2 + 4 * sent / nvlink)
    # Once forward, and backward once more with their gradients; our own attention has kept what it gathered.
    half = one.microbatch(1000, 100, 1000, training=True) / 2
    assert two.microbatch(1000, 100, 1000, training=True) == pytest.approx(half + 4 * 3 * sent / nvlink)
    gathered = trainer(cp=2, share_prefix=True).microbatch(1000, 100, 1000, training=True)
    assert gathered == pytest.approx(half + 4 * 2 * sent / nvlink)


def test_tokens_go_to_their_experts_and_come_back_and_the_fullest_rank_is_waited_for():
    nvlink, rate, sent = 450e9, 0.5 * 989.4e12, 2 * 1000 * 64 * 2 / 2  # copies, tokens, hidden, bytes; half stay
    here = trainer(hf=EXPERTS).microbatch(1000, 0, 1000, training=False)
    even = trainer(hf=EXPERTS, ep=2).microbatch(1000, 0, 1000, training=False)
    full = trainer(hf=EXPERTS, ep=2, imbalance=1.5).microbatch(1000, 0, 1000, training=False)
    assert even == pytest.approx(here + 4 * 2 * sent / nvlink)
    more = 1000 * 2 * 2 * (3 * 64 * 48) / 2 / rate  # half as many copies again, two operations a weight
    assert full == pytest.approx(even + 4 * (more + 2 * 0.5 * sent / nvlink))


def test_gradients_are_reduced_over_the_ranks_that_hold_the_same():
    shard = Shard(
        (0,), 4, parameters=100, weights=200 * 10**9, gradients=400 * 10**9, optimizer=0, expert_parameters=75
    )
    found = trainer(hf=EXPERTS, ep=2, cp=2).after_backward(shard)  # 8 ranks hold the same, 4 the same experts
    assert found["reduce gradients"] == pytest.approx((7 / 8 * 100 + 3 / 4 * 300) / 450)
    assert found["gather weights"] == pytest.approx((7 / 8 * 50 + 3 / 4 * 150) / 450)


@pytest.mark.parametrize(("tokens", "teraflops"), [(1602, 719), (1621, 728)])
def test_flops_of_a_70b_model_are_those_that_megatron_bridge_publishes(tokens: int, teraflops: int):
    """Llama 3 70B on DGX H100, sequences of 8192 tokens: tokens and model FLOPs a second of a GPU, in the performance
    summaries of the NeMo containers 25.11 and 26.02."""
    hf = read_config(Path(__file__).parents[3] / "configs/recipes/models/Llama-3.1-70B")
    flops = forward_flops(hf, 8192)
    ours = 3 * (80 * (flops.layer + flops.attention) + flops.head)
    assert ours == pytest.approx(teraflops * 1e12 / tokens, rel=2e-3)


def test_twice_the_servers_take_half_of_what_is_not_overhead():
    memory = ServerMemory(weights=10**10, experts=0, kv_cache=10**12, kv_token=10**5, other=0)
    job = Job(prompts=512, responses=4096, prompt=256, response=2048, longest=4096)

    def seconds(servers: int) -> float:
        fleet = Fleet(memory, servers, tp=1, concurrency=64, parameters=10**9, mixture=Mixture(1, 0, 0, 0))
        made = generation(fleet, job, GPUS["H100-80GB"], Assumptions(decode_step_ms=0))
        assert made is not None
        return made.seconds

    assert seconds(2) < seconds(1) < 2.2 * seconds(2)


def test_a_server_decodes_with_the_experts_that_its_responses_touch():
    gpu, mixture = GPUS["H100-80GB"], Mixture(1, 128, 8, 10**6)
    memory = ServerMemory(weights=10**10, experts=9 * 10**9, kv_cache=10**12, kv_token=0.001, other=0)
    fleet = Fleet(memory, 1, tp=1, concurrency=1, parameters=130 * 10**6, mixture=mixture)
    job = Job(prompts=0, responses=1, prompt=1, response=1000, longest=1000)
    alone = generation(fleet, job, gpu, Assumptions(decode_step_ms=0))
    assert alone is not None
    read = 10**9 + 9 * 10**9 * 8 / 128
    assert alone.seconds == pytest.approx(1000 * read / (0.7 * 3350e9))
    every = generation(replace(fleet, mixture=Mixture(1, 0, 0, 0)), job, gpu, Assumptions(decode_step_ms=0))
    assert every is not None
    assert every.seconds == pytest.approx(1000 * 10**10 / (0.7 * 3350e9))


def test_full_recomputation_adds_a_forward_and_interleaving_divides_the_bubble():
    plain, recomputed = trainer(), trainer("full")
    one = plain.microbatch(100, 0, 100, training=True)
    assert recomputed.microbatch(100, 0, 100, training=True) == pytest.approx(4 / 3 * one)
    assert trainer(pp=2, vpp=2).bubble(8) == pytest.approx(0.5 / 8.5)
