"""What a config is told about the model, the tokenizer and the processes it meets, before anything starts."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_urlvr.config.checks import cautions, check
from megatron_urlvr.config.loader import load_config
from megatron_urlvr.rewards import get_reward

HF = {
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 6,
    "intermediate_size": 256,
    "vocab_size": 100,
    "max_position_embeddings": 2048,
}


@pytest.fixture
def found(write):
    def _found(*overrides: str, hf: dict[str, Any] | None = None, world: int = 1, size: int | None = 90, device="cpu"):
        config = load_config(write(), overrides)
        return check(config, world_size=world, hf_config={**HF, **(hf or {})}, tokenizer_size=size, device=device)

    return _found


@pytest.mark.parametrize(
    ("ep", "said"),
    [
        (3, "parallel.ep = 3 does not divide the 2 data-parallel x 2 context-parallel ranks over which experts"),
        (4, "parallel.ep = 4 does not divide the 6 experts of model.path = 'bases/small': these sizes do: 1, 2, 3, 6."),
    ],
)
def test_experts_are_spread_evenly(found, ep, said):
    (sentence,) = found(f"parallel.ep={ep}", "parallel.cp=2", world=4, hf={"num_experts": 6})
    assert said in sentence


@pytest.mark.parametrize(
    ("world", "overrides"),
    [(1, []), (8, []), (4, ["parallel.tp=2", "parallel.pp=2"]), (6, ["parallel.pp=3", "parallel.dp=2"])],
)
def test_a_layout_that_fits_is_not_complained_about(found, world, overrides):
    assert found(*overrides, world=world) == []


def test_all_that_is_wrong_is_listed_together(found):
    sentences = found(
        "parallel.tp=4",
        "parallel.pp=4",
        "data.max_prompt_tokens=2040",
        "run.device=cuda",
        world=10,
        size=101,
    )
    assert len(sentences) == 6
    assert all(sentence.endswith(".") for sentence in sentences)


@pytest.mark.parametrize(
    ("overrides", "world", "said"),
    [
        (
            ["parallel.tp=2"],
            3,
            "parallel.tp = 2 x parallel.pp = 1 makes 2 processes a replica, which does not divide the 3",
        ),
        (["parallel.dp=2"], 1, "x parallel.dp = 2 is 2 processes, but 1 were started: set parallel.dp=1 or auto"),
        (["parallel.dp=2", "parallel.tp=2"], 8, "is 4 processes, but 8 were started: set parallel.dp=4 or auto"),
        ([], 3, "rollout.prompts = 8 cannot be shared evenly by 3 data-parallel replicas: make it a multiple of 3"),
        (["algorithm.mini_batch=2"], 4, "algorithm.mini_batch = 2 cannot be shared evenly by 4 data-parallel replicas"),
        (["parallel.tp=4"], 4, "parallel.tp = 4 does not divide the 2 key-value heads of model.path = 'bases/small'"),
        (["parallel.pp=4"], 4, "parallel.pp = 4 does not divide the 6 layers of model.path = 'bases/small': "),
        (["parallel.pp=4"], 4, "these sizes do: 1, 2, 3, 6."),
        (["parallel.cp=2"], 3, "x parallel.pp = 1 x parallel.cp = 2 makes 2 processes a replica"),
        (["parallel.ep=2"], 2, "parallel.ep = 2 spreads experts, but model.path = 'bases/small' is no mixture"),
        (["model.fp8=hybrid"], 1, "model.fp8 = 'hybrid' needs Transformer Engine on a GPU: set model.fp8=none here."),
        (
            ["rollout.max_new_tokens=1025"],
            1,
            "= 1024 and rollout.max_new_tokens = 1025 add up to 2049, more than the 2048",
        ),
        (
            ["eval.sets.h={task: chain_sum, size: 4, max_new_tokens: 2000}"],
            1,
            "eval.sets.h.max_new_tokens = 2000 add up to 3024",
        ),
        (["run.device=cuda"], 1, "run.device = 'cuda', but torch sees no CUDA device"),
    ],
)
def test_each_thing_that_does_not_fit_is_named_with_what_would(found, overrides, world, said):
    (sentence,) = found(*overrides, world=world)
    assert said in sentence


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts"])
@pytest.mark.parametrize(
    ("overrides", "experts", "said"),
    [
        (["parallel.ep=4"], 8, None),
        (["parallel.ep=2", "parallel.tp=2", "parallel.sequence_parallel=true"], 8, None),
        (["parallel.ep=2"], None, "parallel.ep = 2 spreads experts, but model.path = "),
        (["parallel.ep=4"], 6, "parallel.ep = 4 does not divide the 6 experts of model.path = "),
        (["parallel.ep=3"], 6, "parallel.ep = 3 does not divide the 4 data-parallel x 1 context-parallel ranks"),
        (["parallel.ep=2", "parallel.tp=2"], 8, "parallel.tp = 2 shards a mixture of experts, which Megatron trains"),
    ],
)
def test_experts_are_spread_evenly_over_the_ranks_of_a_mixture(found, name, overrides, experts, said):
    hf = {} if experts is None else {name: experts, "moe_intermediate_size": 64}
    sentences = found(*overrides, hf=hf, world=4)
    assert len(sentences) == (said is not None)
    assert said is None or sentences[0].startswith(said)


def test_without_key_value_heads_in_the_model_its_attention_heads_count(write):
    config = load_config(write(), ["parallel.tp=8"])
    hf = {key: value for key, value in HF.items() if key != "num_key_value_heads"}
    assert check(config, world_size=8, hf_config=hf, tokenizer_size=90, device="cpu") == []


@pytest.mark.parametrize(("size", "wrong"), [(None, 0), (100, 0), (101, 1)])
def test_a_tokenizer_larger_than_the_vocabulary_is_refused(found, size, wrong):
    sentences = found(size=size)
    assert len(sentences) == wrong
    assert all("tokenizer has 101 entries, but its config.json says vocab_size = 100" in item for item in sentences)


def test_the_cpu_of_a_machine_with_cuda_is_had_by_hiding_the_devices(found):
    (sentence,) = found("run.device=cpu", device="cuda")
    assert "hide them with CUDA_VISIBLE_DEVICES=" in sentence
    assert found("run.device=cuda", device="cuda") == found(device="cuda") == []


def test_a_supervised_reward_needs_labels_in_the_data(found):
    reward = "reward.terms.main.name=ground_truth"
    assert found(reward) == []
    assert found(reward, "data.train={path: t.jsonl}") == []
    (sentence,) = found(reward, "data.train={path: t.jsonl, label_field: null}")
    assert sentence.startswith("data.train.label_field = null, but the reward ground_truth reads labels")


def test_a_reward_whose_signal_nothing_provides_is_refused(found, monkeypatch):
    monkeypatch.setattr(get_reward("majority_vote"), "needs", frozenset({"judge"}))
    (sentence,) = found("reward.terms.main.name=majority_vote")
    assert "'majority_vote' (reward.terms.main) needs the signal 'judge', which nothing in this run" in sentence


def test_whose_statistics_is_no_setting_of_a_reward_that_is_made_of_none(found):
    votes = "reward.terms.main.name=majority_vote"
    assert found(votes) == []
    (sentence,) = found(votes, "reward.judge=reference")
    assert "reward.judge = 'reference' is about token statistics, and no reward of this run is made of any" in sentence
    (sentence,) = found(votes, "reward.temperature=0.7")
    assert "reward.temperature = 0.7 is about token statistics" in sentence
    certain = ["reward.terms.main.name=rent", "reward.judge=reference", "reward.temperature=0.7"]
    assert found(*certain) == []
    assert found(votes, "reward.temperature=0.7", "algorithm.entropy_scaling=true") == []


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["optim.warmup_steps=19"], None),
        (["optim.warmup_steps=20"], "lasts as long as the run: run.steps = 10 makes 20 optimizer steps"),
        (["optim.warmup_steps=20", "run.steps=0"], None),
        (
            ["rollout={engine: replay, replay_from: x}", "algorithm.epochs=2"],
            "takes recorded responses for the policy's",
        ),
        (["rollout={engine: replay, replay_from: x}", "algorithm.correction.old_logp=rollout"], None),
    ],
)
def test_what_is_more_likely_a_mistake_is_told_and_not_refused(write, overrides, said):
    found = cautions(load_config(write(), ["run.steps=10", "algorithm.mini_batch=4", *overrides]))
    assert (len(found) == 1 and said in found[0]) if said else not found
