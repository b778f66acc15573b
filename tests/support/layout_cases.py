"""One recorded run, and everything that must come out the same of it whatever the layout.

The parent process of `tests/distributed` computes it alone; `layout_worker.py` computes it on each of several ranks.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gradients import policy_gradients
from tiny_models import FAMILIES, random_rows, write_family, write_qwen2

from megatron_urlvr.algorithms.advantages import get_advantage
from megatron_urlvr.algorithms.direct import build_objective
from megatron_urlvr.config.algorithm import DirectSection, KLSection, LossName, RLSCSection
from megatron_urlvr.config.model import ModelSection
from megatron_urlvr.config.parallel import ParallelSection
from megatron_urlvr.config.root import Config
from megatron_urlvr.data.labels import LabelStore
from megatron_urlvr.data.sources import load_source
from megatron_urlvr.data.stream import PromptStream
from megatron_urlvr.data.tokenizer import bare_tokens, load_tokenizer
from megatron_urlvr.distributed.exchange import my_share
from megatron_urlvr.distributed.layout import joined
from megatron_urlvr.loop.assembly import Parts, build
from megatron_urlvr.loop.batching import mini_batches, reward_groups, score_groups, training_rows
from megatron_urlvr.policy.batch import Row, plan_microbatches
from megatron_urlvr.policy.policy import Policy
from megatron_urlvr.rewards.base import ANSWER, LABEL
from megatron_urlvr.rewards.combine import RewardResult
from megatron_urlvr.rewards.judge import judge_text
from megatron_urlvr.rewards.registry import available, get_reward
from megatron_urlvr.rollout.records import group_to_record, write_records
from megatron_urlvr.rollout.replay import rollout_file
from megatron_urlvr.types import STATISTICS, Group, Prompt, Sample, Sampling, samples_of

PROMPTS, VOTES, LONGEST, STEPS = 8, 4, 16, 3
VOCAB = 29
"""Of the model: more than the tokenizer's 21, and 30 after padding at TP=2."""
DIRECT: tuple[LossName, ...] = ("em_ft", "self_certainty", "rlsc")
OPTIONS: Mapping[str, list[dict[str, Any]]] = {
    "self_certainty": [{"aggregation": "mean"}, {"aggregation": "sum"}],
    "token_entropy": [{"aggregation": "mean"}, {"aggregation": "sum"}],
    "trajectory_entropy": [{"aggregation": "mean"}, {"aggregation": "sum"}],
    "length": [{"target": 5, "sign": -1, "scale": 4}],
}
"""What the rewards that cannot do without options are given."""
REWARDS = [
    name
    for name in available()
    if all(need in STATISTICS or need == LABEL or need.startswith(ANSWER) for need in get_reward(name).needs)
]
"""The rewards that a recording of responses is enough for: they ask no other model and no program."""
REWARDS.append("self_verification")
JUDGE: Mapping[str, Any] = {
    "name": "judge",
    "cotrain": "vote",
    "template": "{question}{response}",
    "verdict": "whole",
    "yes": "c",
    "no": "q",
    "samples": 3,
    "temperature": 0.9,
    "max_new_tokens": 2,
}
"""The policy judges its own responses; its verdicts are recorded, and trained on beside them."""


@dataclass(frozen=True)
class Case:
    """The files of one model: its folder and a recording made with it."""

    name: str
    model: Path
    recorded: Path
    vocab: str
    """`model.vocab`."""


def config_of(
    case: Case, folder: Path, *, parallel: Mapping[str, Any] | None = None, **more: Mapping[str, Any]
) -> Config:
    """A run on replayed rollouts with a term for every registered reward; two mini-batches a step, two epochs.

    `more`: settings that replace others, by section.
    """
    terms = {
        f"{name} {i}": {"name": name, "weight": 0.1 + 0.07 * (k + i), "normalize": k % 2 == 0, **options}
        for k, name in enumerate(REWARDS)
        for i, options in enumerate(OPTIONS.get(name, [{}]))
    }
    tree: dict[str, Any] = {
        "run": {"name": "layout", "dir": str(folder), "seed": 3, "steps": STEPS},
        "model": {"path": str(case.model), "vocab": case.vocab},
        "data": {"train": {"task": "chain_sum", "size": 64}, "max_prompt_tokens": 16},
        "rollout": {
            "engine": "replay",
            "replay_from": str(case.recorded),
            "prompts": PROMPTS,
            "n_votes": VOTES,
            "max_new_tokens": LONGEST,
            "temperature": 0.9,
        },
        "reward": {"terms": terms, "providers": {"judge": dict(JUDGE)}},
        "algorithm": {
            "advantage": "rloo",
            "mini_batch": PROMPTS // 2,
            "epochs": 2,
            "kl": {"coef": 0.1, "estimator": "k3"},
        },
        "optim": {"lr": 1e-3, "clip_grad": 0.0, "ema_decay": 0.9},
        "parallel": {"max_tokens_per_microbatch": 64, **(parallel or {})},
        "checkpoint": {"every": 0},
        "monitor": {"tensorboard": False},
    }
    for section, values in more.items():
        tree[section] = {**tree.get(section, {}), **values}
    return Config.model_validate(tree)


def sampling_config(case: Case, run: Path, *, parallel: Mapping[str, Any] | None = None) -> Config:
    """One step on the embedded engine's samples, recorded, with an evaluation before and after."""
    sets = {"held_out": {"task": "chain_sum", "size": 7, "samples": 2, "base_votes": 3}}
    return config_of(
        case,
        run,
        parallel=parallel,
        run={"steps": 1},
        rollout={"engine": "embedded", "replay_from": None, "record": True},
        eval={"every": 1, "sets": sets},
    )


def record(case: Case, *, vocab: int) -> None:
    """The rollouts of `STEPS` steps: right and wrong chains, some cut off, and noise of any of `vocab` tokens."""
    tokenizer = load_tokenizer(case.model)
    config = config_of(case, case.recorded)
    source = load_source(
        config.data.train,
        name="train",
        tokenizer=tokenizer,
        labels=LabelStore(),
        split="train",
        seed=config.run.seed,
        max_prompt_tokens=16,
        overlong="refuse",
    )
    stream = PromptStream(source.prompts, seed=config.run.seed, shuffle=True)
    rng, judge = random.Random(5), random.Random(6)
    task: Any = source.task
    steps: list[list[Group]] = []
    for _ in range(STEPS):
        steps.append([])
        for place, prompt in enumerate(stream.next(PROMPTS)):
            samples = []
            for index in range(VOTES):
                tokens = tokenizer(task.demonstration(prompt, rng), add_special_tokens=False)["input_ids"]
                if rng.random() < 0.3:
                    tokens = [rng.randrange(vocab) for _ in range(rng.randint(1, LONGEST))]
                # Every other prompt's are short, so that two replicas need different numbers of micro-batches.
                tokens = tokens[: 4 if place % 2 else LONGEST]
                text = str(tokenizer.decode([t for t in tokens if t < 21], skip_special_tokens=True))
                stopped = tokens[-1] == tokenizer.eos_token_id
                samples.append(Sample(prompt.id, index, tokens, text, "stop" if stopped else "length"))
            verdicts = [_verdicts(prompt, sample, tokenizer, judge) for sample in samples]
            steps[-1].append(Group(prompt, samples, beside=verdicts))
    recorded = [group for groups in steps for group in groups]
    _fill_log_probs(case, [*recorded, *(g for group in recorded for g in group.beside)], config.rollout.temperature)
    for step, groups in enumerate(steps, start=1):
        write_records(rollout_file(case.recorded, step), [group_to_record(group) for group in groups])


def _verdicts(prompt: Prompt, sample: Sample, tokenizer: Any, rng: random.Random) -> Group:
    """What a judge that mostly says something may have said of a response."""
    text = judge_text(JUDGE["template"], prompt, sample)
    asked = Prompt(f"{prompt.id}#judge{sample.index}", "", bare_tokens(tokenizer, text, special=True))
    said = [rng.choice("ccqq#") for _ in range(JUDGE["samples"])]
    tokens = [tokenizer(word, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for word in said]
    return Group(asked, [Sample(asked.id, k, tokens[k], word, "stop") for k, word in enumerate(said)])


def _fill_log_probs(case: Case, groups: Sequence[Group], temperature: float) -> None:
    parallel = ParallelSection()
    with joined(parallel) as layout:
        policy = Policy(ModelSection(path=str(case.model)), parallel, layout, temperature=temperature)
        rows = [Row(group.prompt.tokens, sample.tokens) for group in groups for sample in group.samples]
        for sample, stats in zip(samples_of(groups), policy.score(rows, frozenset({"logp"})), strict=True):
            sample.logp = stats.get("logp")


def make_cases(root: Path) -> list[Case]:
    """An untied model whose whole vocabulary counts, and a tied one of which the tokenizer's part counts."""
    cases = []
    for name, vocab, tokens in (("untied", "config", VOCAB), ("tied", "tokenizer", 21)):
        model = write_qwen2(root / name, tied=name == "tied", vocab_size=VOCAB, layers=4, seed=7)
        case = Case(name, model, root / f"{name}_recorded", vocab)
        record(case, vocab=tokens)
        cases.append(case)
    return cases


@dataclass
class Observed:
    """What one rank saw. Tensors by prompt id are this replica's; everything else is the same on every rank."""

    rank: int
    replica: int
    stats: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    """By prompt id and statistic: all samples' tokens laid end to end."""
    reference_stats: dict[str, torch.Tensor] = field(default_factory=dict)
    """Log-probs under reference weights that are 5% off."""
    rewards: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    """By prompt id: every term and `total`."""
    advantages: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    """By prompt id and estimator."""
    members: list[list[str]] = field(default_factory=list)
    """Prompt ids of this replica in each mini-batch."""
    metrics: list[dict[str, float]] = field(default_factory=list)
    """Of each mini-batch's update."""
    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)
    """Of each mini-batch, by Hugging Face name."""
    microbatches: list[int] = field(default_factory=list)
    """Number of micro-batches that this replica's part of each mini-batch needs."""
    direct: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    """Gradients of the directly minimised losses on the last mini-batch, by loss and Hugging Face name."""
    exported: dict[str, torch.Tensor] = field(default_factory=dict)
    """The weights that were loaded."""
    stepped: dict[str, torch.Tensor] = field(default_factory=dict)
    """The weights after one real step."""


@dataclass(frozen=True)
class Seen:
    """What the ranks of one layout saw of one case, and the runs they trained."""

    ranks: list[Observed]
    run: Path
    """On replayed rollouts."""
    sampled: Path
    """On the embedded engine's, of the last case."""


def observe(config: Config) -> Observed:
    """Score, reward and train on step 1 of the recording, every update from the same weights."""
    with joined(config.parallel, seed=config.run.seed) as layout, closing(build(config, layout)) as parts:
        seen = Observed(layout.rank, layout.dp_rank)
        seen.exported = {name: tensor.clone() for name, tensor in parts.policy.export()}
        assert parts.policy.reference is not None
        for tensor in parts.policy.reference.tensors.values():
            tensor.mul_(1.05)
        if parts.engine is not None:
            parts.engine.begin_step(1)
        prompts = my_share(parts.stream.next(PROMPTS), layout)
        groups = parts.generate(prompts, Sampling(VOTES, LONGEST, config.rollout.temperature))
        _observe_scores(config, parts, groups, seen)
        results = _observe_rewards(config, parts, groups, seen)
        _observe_updates(config, parts, training_rows(config, parts, groups, results), groups, seen)
        return seen


def _observe_scores(config: Config, parts: Parts, groups: Sequence[Group], seen: Observed) -> None:
    rows = [Row(group.prompt.tokens, sample.tokens) for group in groups for sample in group.samples]
    found = iter(parts.policy.score(rows, STATISTICS))
    other = iter(parts.policy.score(rows, frozenset({"logp"}), "reference"))
    for group in groups:
        mine = [next(found) for _ in group.samples]
        seen.stats[group.prompt.id] = {name: torch.cat([stats.get(name) for stats in mine]) for name in STATISTICS}
        seen.reference_stats[group.prompt.id] = torch.cat([next(other).get("logp") for _ in group.samples])


def _observe_rewards(config: Config, parts: Parts, groups: Sequence[Group], seen: Observed) -> list[RewardResult]:
    score_groups(config, parts, groups)
    results = reward_groups(parts, groups)
    for group, result in zip(groups, results, strict=True):
        seen.rewards[group.prompt.id] = {**result.by_term, "total": result.total}
        seen.advantages[group.prompt.id] = {
            name: get_advantage(name)(result.total[None])[0] for name in ("grpo", "dr_grpo", "rloo")
        }
    return results


def _observe_updates(
    config: Config, parts: Parts, rows: list[list[Row]], groups: Sequence[Group], seen: Observed
) -> None:
    """Every mini-batch with old log-probs that are off by up to 0.4, at a learning rate of 0; then one real step."""
    owner = {id(row): group.prompt.id for group, members in zip(groups, rows, strict=True) for row in members}
    for members in rows:
        for k, row in enumerate(members):
            assert row.old_logp is not None
            assert row.ref_logp is not None
            row.old_logp = row.old_logp + 0.4 * torch.cos(torch.arange(len(row.old_logp)) * 1.7 + k)
    for batch in mini_batches(config, parts.layout, rows):
        seen.members.append(list(dict.fromkeys(owner[id(row)] for row in batch)))
        budget = config.parallel.max_tokens_per_microbatch
        seen.microbatches.append(len(plan_microbatches(batch, max_tokens=budget, share_prefix=True)))
        seen.metrics.append(parts.policy.update(batch, parts.loss, lr=0.0))
        seen.gradients.append(policy_gradients(parts.policy))
    for name in DIRECT:
        section = RLSCSection(name="rlsc", alpha=0.3) if name == "rlsc" else DirectSection(name=name)
        loss = build_objective(section, KLSection())
        logp = [row.old_logp for row in batch if row.old_logp is not None]
        for row, coefficient in zip(batch, loss.coefficients([], logp), strict=True):
            row.advantage = coefficient
        parts.policy.update(batch, loss, lr=0.0)
        seen.direct[name] = policy_gradients(parts.policy)
    if parts.layout.world_size > 1:  # what an update takes back is what one process never gave away
        parts.policy.offload()
    parts.policy.update(batch, parts.loss, lr=1e-2)
    seen.stepped = {name: tensor.clone() for name, tensor in parts.policy.export()}


# -- families ---------------------------------------------------------------------------------------------------------


def family_rows() -> list[Row]:
    """Rows that every family is scored on."""
    return random_rows(6, vocab=VOCAB, longest=40)


def write_families(root: Path) -> dict[str, Path]:
    """A folder of every family, with four layers."""
    return {name: write_family(root / name, name, layers=4) for name in FAMILIES}


def score_families(folders: Mapping[str, Path], parallel: Mapping[str, Any]) -> dict[str, list[torch.Tensor]]:
    """Log-probs of `family_rows` under every family in a layout. Megatron trains experts under tensor parallelism with
    sequence parallelism alone: without, they are left out."""
    section = ParallelSection(**parallel, max_tokens_per_microbatch=48)
    found = {}
    with joined(section) as layout:
        for name, folder in folders.items():
            if name == "qwen3_moe" and section.tp > 1 and not section.sequence_parallel:
                continue
            policy = Policy(ModelSection(path=str(folder)), section, layout)
            found[name] = [stats.get("logp") for stats in policy.score(family_rows(), frozenset({"logp"}))]
    return found
