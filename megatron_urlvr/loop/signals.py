"""What rewards need beyond token statistics and answers: where answers stand, and what providers fetch.

    leader of a replica: locate answers, run every provider ─► signals of its groups ─► the replica's other ranks

A model that is asked is the policy's own engine, an engine with the starting or averaged weights, or servers that keep
theirs. Weights travel by the same stream as to the policy's engine, and only when they have moved.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data.grading.grader import Grader
from ..data.grading.locate import tokens_at
from ..data.tokenizer import bare_tokens, chat_text
from ..distributed.agreement import agreed
from ..distributed.exchange import gather_from_leaders, hand_over
from ..distributed.layout import Layout, broadcast_json
from ..policy.policy import Policy
from ..rewards.providers import Checker, Lesson, Provider, ProviderContext, Respondent, Weights, fill
from ..rewards.spans import ANSWER_END, ANSWER_START, SPAN_SIGNALS
from ..rollout.engine import RolloutEngine
from ..rollout.records import group_from_record, group_to_record, pack_floats, unpack_floats
from ..types import Group, Prompt, Sampling


@dataclass
class ModelRespondent:
    """A rollout engine that answers a provider's prompts, with the tokenizer of its model."""

    engine: RolloutEngine
    tokenizer: PreTrainedTokenizerBase
    context: int

    def encode(self, text: str, *, chat: bool) -> tuple[int, ...]:
        """See Respondent. DataError for a tokenizer without a chat template."""
        return bare_tokens(self.tokenizer, chat_text(self.tokenizer, text) if chat else text, special=not chat)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """See Respondent."""
        found = {group.prompt.id: group for group in self.engine.generate(prompts, sampling)}
        return [found[prompt.id] for prompt in prompts]


@dataclass
class Signals:
    """The signals of a run's rewards, on one rank. `fetch` is collective."""

    layout: Layout
    policy: Policy
    needs: frozenset[str]
    providers: Mapping[str, tuple[type[Provider[Any]], Any]]
    """Class and options of each provider, by label."""
    seed: int
    respondent_of: Callable[[Weights, str], Respondent]
    """Makes a respondent other than the policy's own, on leaders; its embedded engine awaits weights."""
    own: Respondent | None
    """The policy's engine as a respondent, on leaders."""
    grader_of: Callable[[Prompt], Grader]
    checkers_of: Callable[[Prompt], Mapping[str, Checker]]
    decode: Callable[[Sequence[int]], str]
    _made: dict[tuple[Weights, str], Respondent] = field(default_factory=dict)
    _pushed: dict[str, int] = field(default_factory=dict)
    _shared: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The memory of each provider that remembers, as all replicas know it."""

    def __post_init__(self) -> None:
        context = ProviderContext(self.seed, self.respondent, self.grader_of, self.checkers_of)
        self.active = {label: cls(options, context) for label, (cls, options) in self.providers.items()}
        """Providers by label, on every rank; leaders alone run them."""
        self._shared = {label: {} for label, provider in self.active.items() if provider.remembers}

    def problems(self, prompts: Sequence[Prompt]) -> list[str]:
        """What keeps the providers from working on these prompts, a sentence each."""
        return [
            f"reward.providers.{label}: {problem}."
            for label, provider in self.active.items()
            for problem in provider.problems(prompts)
        ]

    def respondent(self, weights: Weights, pool: str) -> Respondent:
        """The model with these weights, made when first asked for."""
        if weights == "policy":
            assert self.own is not None, "only leaders ask"
            return self.own
        key = (weights, pool if weights == "servers" else "")
        if key not in self._made:
            self._made[key] = self.respondent_of(weights, pool)
        return self._made[key]

    def fetch(self, groups: Sequence[Group]) -> None:
        """Fill the signals of this replica's `groups`, on all its ranks. RolloutFailed, Abandoned or UnusableInput on
        every rank alike."""
        wanted = set(self.needs & SPAN_SIGNALS).union(*(provider.provides for provider in self.active.values()))
        if not wanted:
            return
        self._hand_over_weights()
        with agreed(self.layout):
            if self.layout.is_leader:
                if self.needs & SPAN_SIGNALS:
                    locate_answers(groups, self.grader_of, self.decode)
                asyncio.run(self._run(groups))
        self._share(groups, sorted(wanted))
        self._remember()

    def state_dict(self) -> dict[str, Any]:
        """What providers remember, for checkpoints, by label: the same on every rank."""
        return {
            label: {"provider": self._identity(label), "memory": dict(memory)} for label, memory in self._shared.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`. What another provider remembered, or the same one with other options, is left;
        what has been remembered since stays, since a memory is never taken back."""
        for label, memory in self._shared.items():
            if label in state and state[label]["provider"] == self._identity(label):
                self._shared[label] = {**state[label]["memory"], **memory}
                self.active[label].memory = dict(self._shared[label])

    def _identity(self, label: str) -> dict[str, Any]:
        cls, options = self.providers[label]
        return {"name": cls.name, **options.model_dump(mode="json")}

    def _remember(self) -> None:
        """Collective: what providers have come to remember on any replica, all of them know from now on."""
        if not self._shared:
            return
        new = {
            label: {key: value for key, value in self.active[label].memory.items() if key not in memory}
            for label, memory in self._shared.items()
        }
        told = gather_from_leaders(new, self.layout)
        for label, memory in self._shared.items():
            for each in told:
                memory.update({key: value for key, value in each[label].items() if key not in memory})
            self.active[label].memory = dict(memory)

    def lessons(self, groups: Sequence[Group]) -> dict[str, list[list[Lesson]]]:
        """What the policy is trained on beside each of `groups`, whose signals are there, by the label of the provider
        that teaches it; labels are the same on every rank."""
        return {
            label: [provider.lessons(group) for group in groups]
            for label, provider in self.active.items()
            if provider.teaches
        }

    async def _run(self, groups: Sequence[Group]) -> None:
        await asyncio.gather(*(provider.fetch(groups) for provider in self.active.values()))

    def _hand_over_weights(self) -> None:
        """Collective: bring the engines that hold starting weights (once) or averaged ones (each time) up to date."""
        asked = {provider.asks for provider in self.active.values()}
        for weights in ("reference", "ema"):
            times = self._pushed.get(weights, 0)
            if weights not in asked or (weights == "reference" and times):
                continue
            respondent = self.respondent(weights, "") if self.layout.is_leader else None
            engine = respondent.engine if isinstance(respondent, ModelRespondent) else None
            hand_over(self.policy, engine, self.layout, version=times + 1, weights=weights)
            self._pushed[weights] = times + 1

    def _share(self, groups: Sequence[Group], names: Sequence[str]) -> None:
        if len(self.layout.replica_ranks) == 1:
            return
        told = None
        if self.layout.is_leader:
            told = [
                {
                    "signals": {name: pack_floats(group.signals[name]) for name in names},
                    "beside": [group_to_record(each) for each in group.beside],
                }
                for group in groups
            ]
        told = broadcast_json(told, source=self.layout.replica_ranks[0], group=self.layout.replica)
        if self.layout.is_leader:
            return
        for group, own in zip(groups, told, strict=True):
            group.beside = [group_from_record(record) for record in own["beside"]]
            for name in names:
                if (value := unpack_floats(own["signals"][name])) is not None:
                    group.signals[name] = value

    def metrics(self) -> dict[str, float]:
        """What the servers of other pools measured since the last call, under the pool's name; counts."""
        return {
            f"{pool}/{name.removeprefix('rollout/')}": value
            for (weights, pool), respondent in self._made.items()
            if weights == "servers" and isinstance(respondent, ModelRespondent)
            for name, value in respondent.engine.metrics().items()
        }

    def close(self) -> None:
        """End providers and the engines made for them."""
        for provider in self.active.values():
            provider.close()
        for respondent in self._made.values():
            if isinstance(respondent, ModelRespondent):
                respondent.engine.close()


def locate_answers(
    groups: Sequence[Group], grader_of: Callable[[Prompt], Grader], decode: Callable[[Sequence[int]], str]
) -> None:
    """Fill the signals `answer_start` and `answer_end` of `groups`."""
    for group in groups:
        grader = grader_of(group.prompt)
        places = []
        for sample in group.samples:
            place = grader.locate(sample.text, finished=sample.finish == "stop")
            places.append((-1, -1) if place is None else tokens_at(sample.tokens, place, decode))
        fill(group, ANSWER_START, [first for first, _ in places])
        fill(group, ANSWER_END, [last for _, last in places])


def permuted(ids: Sequence[str], seed: int) -> dict[str, str]:
    """Another prompt for each prompt: one cycle through all of `ids`, decided by `seed`, so that none keeps its own."""
    order = sorted(ids)
    random.Random(f"permuted/{seed}").shuffle(order)
    return dict(zip(order, [*order[1:], *order[:1]], strict=True))
