"""What providers cost a run, against what they really ask for."""

import asyncio
from pathlib import Path

import pytest
from tiny_models import write_qwen2

from megatron_urlvr.config.loader import load_config
from megatron_urlvr.launch.plan.crew import crew_of
from megatron_urlvr.launch.plan.hardware import GPUS, assume
from megatron_urlvr.launch.plan.plan import Plan, load_model, make_plan
from megatron_urlvr.launch.plan.report import as_json, as_text
from megatron_urlvr.rewards.cross_vote import Votes, VotesOptions
from megatron_urlvr.rewards.judge import TEMPLATE, Judge, JudgeOptions
from megatron_urlvr.rewards.providers import ProviderContext
from megatron_urlvr.types import Group, Prompt, Sample

CONFIG = """
run: {{name: small, dir: runs/small, steps: 10, seed: 3}}
model: {{path: {model}}}
data: {{max_prompt_tokens: 16, train: {{task: chain_sum, size: 64}}}}
rollout: {{engine: sglang, prompts: 8, n_votes: 4, max_new_tokens: 64}}
reward: {{terms: {{main: {{name: {reward}}}}}, providers: {{asked: {provider}}}}}
optim: {{lr: 1.0e-3, ema_decay: 0.9}}
parallel: {{dp: 2, max_tokens_per_microbatch: 128}}
servers: {{pools: {{policy: {{context: 512, count: 2}}, judge: {{count: 2, context: 512}}}}}}
eval: {{every: 0}}
"""
VERDICTS = "{name: judge, max_new_tokens: 20, samples: 2, temperature: 1.0}"
TEXT = len(TEMPLATE) - len("{question}{response}")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_qwen2(tmp_path_factory.mktemp("plan") / "model", vocab_size=128, layers=4, tokenizer=False)


@pytest.fixture
def planned(model, tmp_path):
    def call(*overrides: str, reward: str = "self_verification", provider: str = VERDICTS, gpus: int = 4) -> Plan:
        path = tmp_path / "config.yaml"
        path.write_text(CONFIG.format(model=model, reward=reward, provider=provider))
        config = load_config(path, ["model.path=" + str(model), *overrides])
        loaded = load_model(config)
        loaded = type(loaded)({**loaded.hf, "max_position_embeddings": 1024}, loaded.family)
        crew = crew_of(config, gpus if config.rollout.engine == "sglang" else 2, None)
        return make_plan(config, loaded, GPUS["H100-80GB"], crew, assume(["characters_per_token=1"]), built=False)

    return call


class Listener:
    """Answers with nothing, and remembers what it was asked. A character is a token."""

    context = 10_000

    def __init__(self) -> None:
        self.prompts: list[Prompt] = []
        self.samples = 0

    def encode(self, text: str, *, chat: bool) -> tuple[int, ...]:
        return tuple(map(ord, text))

    def generate(self, prompts, sampling) -> list[Group]:
        self.prompts, self.samples = list(prompts), sampling.n
        empty = [Sample("-", k, (0,), "", "stop") for k in range(sampling.n)]
        return [Group(prompt, empty) for prompt in prompts]


class NoAnswers:
    def extract(self, text: str, *, finished: bool = True) -> None:
        return None

    def classes(self, answers) -> list[None]:
        return [None] * len(answers)


@pytest.mark.parametrize(
    "made",
    [
        lambda context: Judge(JudgeOptions(samples=3, max_new_tokens=9), context),
        lambda context: Votes(VotesOptions(of="prompt", weights="reference", samples=3, max_new_tokens=9), context),
    ],
    ids=["judge", "votes"],
)
def test_a_provider_asks_for_what_it_says(made):
    asked = Listener()
    provider = made(ProviderContext(0, lambda weights, pool: asked, lambda prompt: NoAnswers(), lambda prompt: {}))
    samples = [Sample("p", k, (1,) * 7, "r" * 7, "stop") for k in range(4)]
    group = Group(Prompt("p", "q" * 5, (1,) * 5), samples, [None] * 4)
    asyncio.run(provider.fetch([group]))
    said = provider.request(4, 5, 7)
    assert (said.prompts, said.samples) == (len(asked.prompts), asked.samples)
    assert {len(prompt.tokens) for prompt in asked.prompts} == {said.tokens + len(said.text)}


def test_a_judge_on_the_policys_servers_takes_its_time_of_the_step(planned):
    plan = planned()
    [judge] = plan.times.asked
    assert judge.asked.job is not None
    job = judge.asked.job
    assert (job.prompts, job.responses) == (8 * 4, 8 * 4 * 2)
    assert (job.prompt, job.response, job.longest) == (0.25 * 16 + 0.5 * 64 + TEXT, 10, 20)
    told = as_json(plan)["seconds"]
    assert told["ask"] == judge.seconds > 0
    assert told["total"] == pytest.approx(sum(told[each] for each in ("generate", "ask", "score", "train", "sync")))
    assert f"asked (judge): asks the policy's servers 32 prompts of {job.prompt:.0f} tokens, 64 answers" in as_text(
        plan
    )
    stale = ("rollout.max_staleness=1", "algorithm.correction.old_logp=rollout")
    beside = as_json(planned(*stale))["seconds"]
    longer = max(beside["generate"], beside["score"] + beside["train"])
    assert beside["total"] == pytest.approx(beside["ask"] + longer + beside["sync"])


def test_a_judge_on_its_own_servers_answers_while_the_policys_generate_the_next_batch(planned):
    other = VERDICTS.replace("samples", "weights: servers, samples")
    plan = planned(provider=other)
    assert plan.times.asked[0].seconds == planned().times.asked[0].seconds  # the same model on as many servers
    assert "2 servers x tp 1, on GPUs beside the 4" in as_text(plan)
    stale = ("rollout.max_staleness=1", "algorithm.correction.old_logp=rollout")
    told = as_json(planned(*stale, provider=other))["seconds"]
    longer = max(told["generate"], told["ask"] + told["score"] + told["train"])
    assert told["total"] == pytest.approx(longer + told["sync"])


def test_a_pool_whose_model_cannot_be_read_is_said_to_be_missing_from_the_total(planned):
    plan = planned(
        "servers.pools.judge.model=/nowhere", provider=VERDICTS.replace("samples", "weights: servers, samples")
    )
    assert plan.times.ask == 0
    assert "what reward.providers.asked asks servers of the pool judge is not in the total." in plan.notes


def test_votes_of_a_teacher_are_asked_once_a_prompt(planned):
    votes = "{name: votes, of: prompt, weights: servers, pool: judge, samples: 5, max_new_tokens: 64, offline: true}"
    plan = planned(reward="co_rewarding", provider=votes)
    job = plan.times.asked[0].asked.job
    assert job is not None
    assert (job.prompts, job.responses, job.prompt, job.response) == (8, 40, 4, 32)
    assert "4 tokens, each once in a run, 40 answers" in as_text(plan)


def test_embedded_judges_are_copies_of_the_model_and_their_time_is_not_modelled(planned):
    plan = planned("rollout.engine=embedded", provider=VERDICTS.replace("samples", "weights: ema, samples"))
    assert plan.times.asked[0].seconds is None
    assert any("keeps 2 more copies" in note for note in plan.notes)
    assert "asks an embedded copy of the moving average 32 prompts" in as_text(plan)


def test_a_checker_asks_nobody(planned):
    plan = planned(reward="program", provider="{name: checker, checker: answer}")
    assert as_json(plan)["seconds"]["ask"] == 0
    assert "asked (checker): asks no model" in as_text(plan)


def test_a_co_trained_judges_verdicts_are_trained_on_and_the_longest_fits(planned):
    plain, taught = planned(), planned(provider=VERDICTS.replace("samples", "cotrain: vote, samples"))
    [rows] = taught.work.lessons
    assert (rows.count, rows.length) == (8 * 4 * 2 * 0.5, 4 + 32 + TEXT + 10 - 1)
    assert taught.work.longest_row == 16 + 64 + TEXT + 20 - 1 < 512
    assert taught.tokens > plain.tokens
    # Each row is a micro-batch of its own, 16 a replica.
    assert taught.times.microbatches == plain.times.microbatches + 16
    assert taught.times.train > plain.times.train
    assert taught.times.lessons == pytest.approx(taught.times.train - plain.times.train, rel=0.2)
    assert "(32 verdicts)" in as_text(taught)


@pytest.mark.parametrize(("judge", "swaps"), [("policy", 0), ("reference", 1), ("ema", 1)])
def test_scoring_under_other_weights_brings_them_from_the_host(planned, judge, swaps):
    checker = "{name: checker, checker: answer}"
    terms = "reward.terms={main: {name: self_certainty, aggregation: mean}, more: {name: program}}"
    plan = planned(terms, f"reward.judge={judge}", provider=checker)
    parameters = plan.ranks[0].shard.parameters
    assert plan.times.swaps == pytest.approx(swaps * 4 * parameters / 20e9)
    assert plan.times.score > plan.times.swaps
