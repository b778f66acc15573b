"""From a config to the parts of a run: policy, engine, data, rewards. Everything is checked before step 0."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from ..algorithms.advantages import Advantage, get_advantage
from ..algorithms.direct import DirectLoss, build_objective
from ..algorithms.losses import PolicyLoss
from ..config.checks import check
from ..config.errors import ConfigError
from ..config.eval import EvalSet
from ..config.root import Config
from ..data.grading.annotate import annotate
from ..data.grading.grader import Grader
from ..data.labels import LabelStore
from ..data.sources import PromptSet, load_source
from ..data.stream import PromptStream
from ..data.tokenizer import load_tokenizer
from ..distributed.agreement import agreed
from ..distributed.exchange import gather_from_leaders, share_groups
from ..distributed.layout import Layout, broadcast_json, gather_json
from ..exit_codes import UnusableInput
from ..monitor.alarms import Alarms
from ..policy.hf.folder import read_config
from ..policy.policy import Policy
from ..rewards.base import PERMUTED_LABEL
from ..rewards.combine import Combined, build_terms
from ..rewards.providers import Checker, Respondent, Weights, get_provider
from ..rollout.early import EarlyVotes
from ..rollout.engine import RolloutEngine
from ..rollout.filters import Filter, get_filter
from ..rollout.sglang import SGLangEngine
from ..rollout.sleep import settle
from ..run.folder import RunDir
from ..types import Group, Prompt, Sampling
from .engines import build_engine, decoder, embedded_engine, frozen_servers, positions, real_vocab
from .signals import ModelRespondent, Signals, permuted


@dataclass
class HeldOut:
    """One evaluation set."""

    spec: EvalSet
    prompts: PromptSet


@dataclass
class Parts:
    """What a run is made of, on this rank."""

    layout: Layout
    tokenizer: PreTrainedTokenizerBase
    labels: LabelStore
    train: PromptSet
    stream: PromptStream
    held_out: dict[str, HeldOut]
    policy: Policy
    engine: RolloutEngine | None
    """On replica leaders; None elsewhere."""
    reward: Combined
    advantage: Advantage
    loss: PolicyLoss | DirectLoss
    signals: Signals
    permuted: dict[str, str]
    """The prompt whose label each training prompt is given, where a reward wants the wrong ones; else empty."""
    alarms: Alarms
    filter: Filter[Any] | None
    """Chooses the groups that are trained on; None where all are."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """Graded groups of this replica's prompts, in their order, on all its ranks."""
        return self.collect(prompts, lambda engine: engine.generate(prompts, sampling))

    def collect(self, prompts: Sequence[Prompt], ask: Callable[[RolloutEngine], Iterator[Group]]) -> list[Group]:
        """As `generate`, of what `ask` gets from the engine. What fails on one leader is raised on all ranks."""
        groups = None
        with agreed(self.layout):
            if self.engine is not None:
                found = {group.prompt.id: group for group in ask(self.engine)}
                groups = [found[prompt.id] for prompt in prompts]
        groups = share_groups(groups, self.layout)
        annotate(groups, self.grader_of)
        return groups

    def engine_metrics(self, counts: Mapping[str, float]) -> dict[str, float]:
        """What the replicas' engines, and their graders of training prompts, measured since the last call, and this
        replica's `counts`, added up."""
        mine: dict[str, float] = {}
        if self.engine is not None:
            mine = self.engine.metrics() | self.signals.metrics() | self.train.grader.counted() | dict(counts)
        total: dict[str, float] = {}
        for measured in gather_from_leaders(mine, self.layout):
            for name, value in measured.items():
                total[name] = total.get(name, 0.0) + value
        return total

    def grader_of(self, prompt: Prompt) -> Grader:
        """The grader of the set that a prompt belongs to."""
        name = prompt.id.split("/", 1)[0]
        return self.held_out[name].prompts.grader if name in self.held_out else self.train.grader

    def correctness(self, group: Group, *, use: str) -> torch.Tensor | None:
        """`[n]` bool: which answers are right. None when the prompt has no label. Each call is a counted use."""
        return self._right_for(group, group.prompt.id, use)

    def can_reward(self, prompt: Prompt) -> bool:
        """Whether responses to `prompt` can be given a reward: its label is there where one is read, and its providers
        find in it what they need."""
        if PERMUTED_LABEL in self.reward.needs and prompt.id not in self.permuted:
            return False
        return (prompt.id in self.labels or not self.reward.supervised) and not self.signals.problems([prompt])

    def permuted_correctness(self, group: Group, *, use: str) -> torch.Tensor | None:
        """`[n]` bool: which answers are right for another prompt's label. None when there is none."""
        return self._right_for(group, self.permuted.get(group.prompt.id, ""), use)

    def _right_for(self, group: Group, labelled: str, use: str) -> torch.Tensor | None:
        label = self.labels.get(labelled, use=use)
        if label is None:
            return None
        grader = self.grader_of(group.prompt)
        return torch.tensor([grader.correct(sample.answer, label) for sample in group.samples], dtype=torch.bool)

    def fingerprints(self) -> dict[str, str]:
        """Hashes of the data, for provenance."""
        return {"data/train": self.train.fingerprint} | {
            f"data/{name}": held.prompts.fingerprint for name, held in self.held_out.items()
        }

    def close(self) -> None:
        """Release engine and grader processes."""
        for prompts in (self.train, *(held.prompts for held in self.held_out.values())):
            prompts.grader.close()
        self.signals.close()
        if self.engine is not None:
            self.engine.close()


def preflight(config: Config, *, world_size: int) -> None:
    """Refuse what cannot work before processes meet and weights are read. ConfigError lists every problem."""
    hf = read_config(config.model.path)
    tokenizer = load_tokenizer(config.model.path)
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    problems = check(config, world_size=world_size, hf_config=hf, tokenizer_size=len(tokenizer), device=device)
    if problems:
        raise ConfigError(problems)


def _reward(config: Config) -> Combined:
    return build_terms(
        config.reward,
        advantage=config.algorithm.advantage,
        seed=config.run.seed,
        kl_in_reward=config.algorithm.kl.coef > 0 and config.algorithm.kl.place == "reward",
    )


def build(config: Config, layout: Layout, *, interrupted: Callable[[], bool] = lambda: False) -> Parts:
    """All parts of a run that `preflight` finds nothing wrong with. UnusableInput for data or weights that the user
    must change. Where servers must sleep first, RolloutFailed when they do not, Abandoned when `interrupted`."""
    tokenizer = load_tokenizer(config.model.path)
    labels = LabelStore()
    limits: dict[str, Any] = {"max_prompt_tokens": config.data.max_prompt_tokens, "overlong": config.data.overlong}
    train = load_source(
        config.data.train,
        name="train",
        tokenizer=tokenizer,
        labels=labels,
        split="train",
        seed=config.run.seed,
        **limits,
    )
    held_out = {
        name: HeldOut(
            spec,
            load_source(spec, name=name, tokenizer=tokenizer, labels=labels, split="held_out", seed=0, **limits),
        )
        for name, spec in config.eval.sets.items()
    }
    reward = _reward(config)
    if problems := [*_training_data(config, train, reward), *_without_labels(held_out)]:
        raise UnusableInput("\n".join(problems))
    sets = {"train": train} | {name: held.prompts for name, held in held_out.items()}
    session = _new_session(layout)
    if config.servers.colocated:
        _settle_servers(config, layout, interrupted)
    policy = Policy(
        config.model,
        config.parallel,
        layout,
        optim=None if config.run.rollout_only else config.optim,
        temperature=config.rollout.temperature,
        real_vocab=real_vocab(config, tokenizer),
        keep_reference=config.keeps_start,
    )
    engine = build_engine(config, policy, tokenizer, session) if layout.is_leader else None
    if isinstance(engine, SGLangEngine) and config.rollout.early_voting:
        engine.votes = EarlyVotes(train.grader, engine.decode)
    signals = build_signals(config, policy, tokenizer, engine, reward, sets)
    if problems := signals.problems(train.prompts):
        if engine is not None:
            engine.close()
        raise UnusableInput("\n".join(problems))
    return Parts(
        layout=layout,
        tokenizer=tokenizer,
        labels=labels,
        train=train,
        stream=PromptStream(train.prompts, seed=config.run.seed, shuffle=config.data.shuffle),
        held_out=held_out,
        policy=policy,
        engine=engine,
        reward=reward,
        advantage=get_advantage(config.algorithm.advantage),
        loss=build_objective(config.algorithm.loss, config.algorithm.kl),
        signals=signals,
        permuted=permuted([p.id for p in train.prompts], config.run.seed) if PERMUTED_LABEL in reward.needs else {},
        alarms=Alarms(announce=layout.is_main),
        filter=_filter(config),
    )


def _settle_servers(config: Config, layout: Layout, interrupted: Callable[[], bool]) -> None:
    """Servers on the trainer's GPUs sleep before the policy takes memory there."""
    name = socket.gethostname()
    hosts = {name} if layout.world_size == 1 else set(gather_json(name, layout.control))
    with agreed(layout):
        if layout.is_main:
            settle(config.servers, RunDir(config.run.dir).servers, hosts=len(hosts), interrupted=interrupted)


def _filter(config: Config) -> Filter[Any] | None:
    section = config.rollout.filter
    if section is None:
        return None
    cls = get_filter(section.name)
    return cls(cls.Options(**section.options))


def _training_data(config: Config, train: PromptSet, reward: Combined) -> Iterator[str]:
    """What is wrong with the training prompts for this run."""
    if len(train) < config.rollout.sampled:
        more = f" x oversample = {config.rollout.oversample:g}" if config.rollout.filter else ""
        fits = int(len(train) / config.rollout.oversample)
        yield (
            f"data.train holds {len(train)} prompts, but rollout.prompts = {config.rollout.prompts}{more} different"
            f" ones make a step: give more data, or set rollout.prompts={fits} or less."
        )
    if reward.supervised and train.unlabelled:
        names = ", ".join(sorted(term.reward.name for term in reward.terms if term.reward.supervised))
        yield (
            f"data.train has no label for {train.unlabelled} of its {len(train)} prompts, but the reward {names} reads"
            " labels: complete the data, or choose a reward that needs none."
        )


def _without_labels(held_out: Mapping[str, HeldOut]) -> Iterator[str]:
    for name, held in held_out.items():
        if held.prompts.unlabelled == len(held.prompts):
            yield (
                f"eval.sets.{name} has no labels, so that nothing can be measured on it: give data with true answers,"
                f" or remove the set ({name}: null)."
            )


def build_signals(
    config: Config,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    engine: RolloutEngine | None,
    reward: Combined,
    sets: Mapping[str, PromptSet],
) -> Signals:
    """What rewards need beyond token statistics and answers. `sets`: prompts by the name that begins their ids."""

    def set_of(prompt: Prompt) -> PromptSet:
        return sets.get(prompt.id.split("/", 1)[0], sets["train"])

    def checkers_of(prompt: Prompt) -> Mapping[str, Checker]:
        return set_of(prompt).checkers

    def respondent_of(weights: Weights, pool: str) -> Respondent:
        if weights == "servers":
            return frozen_servers(config, pool, replicas=policy.layout.dp, like=engine)
        made = embedded_engine(config.model.path, policy, tokenizer, max_batch=config.rollout.batch)
        return ModelRespondent(made, tokenizer, positions(policy.hf))

    chosen = config.reward.providers.items()
    classes = {label: get_provider(section.name) for label, section in chosen}
    return Signals(
        layout=policy.layout,
        policy=policy,
        needs=reward.needs,
        providers={label: (classes[label], classes[label].Options(**section.options)) for label, section in chosen},
        seed=config.run.seed,
        respondent_of=respondent_of,
        own=None if engine is None else ModelRespondent(engine, tokenizer, positions(policy.hf)),
        grader_of=lambda prompt: set_of(prompt).grader,
        checkers_of=checkers_of,
        decode=decoder(tokenizer),
    )


def _new_session(layout: Layout) -> str:
    """A name for this process, or these processes together, that no earlier one had."""
    name = secrets.token_hex(4)
    return name if layout.world_size == 1 else str(broadcast_json(name, source=0, group=layout.control))
