"""Labels from somebody else's votes: the same question in other words, or other weights.

Co-rewarding I labels a question by the vote on its paraphrase; II by the vote of a teacher that follows slowly. With
the starting weights and draws that never change, the votes are offline: whatever a policy gains then is no feedback of
its own sharpening.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field

from megatron_urlvr.config.base import rule
from megatron_urlvr.types import Group, Prompt, Sampling

from .base import BINARY, NoOptions, Reward, signal_of
from .providers import AskedOptions, Provider, Request, Weights, fill, register_provider, seed_of
from .registry import register
from .voting import vote

CROSS_VOTE = "cross_vote"
"""Signal: 1 where the answer is the one that the other vote chose, `[n]` float32."""
NO_WINNER = "cross_vote_none"
"""Signal: 1 where the other vote chose none, `[n]` float32."""


class VotesOptions(AskedOptions):
    of: Literal["prompt", "paraphrase"]
    """What is voted on: the prompt itself, or its paraphrase (`data.train.paraphrase_field`, or the task's own)."""
    weights: Weights = "policy"
    """Who votes: `policy`, `reference` (the starting weights), `ema`, or `servers`."""
    pool: str = "teacher"
    """The pool of `servers.pools` that votes under `weights: servers`."""
    samples: int = Field(ge=1)
    """Votes on each prompt."""
    temperature: float = Field(default=1.0, gt=0)
    """Their sampling temperature."""
    max_new_tokens: int = Field(ge=1)
    """Longest response, in tokens."""
    offline: bool = False
    """Vote on a prompt once and keep the outcome for all steps; needs weights that stay the same."""

    @rule("of", "weights")
    def _others(self) -> str | None:
        if self.of == "prompt" and self.weights == "policy":
            return (
                "of = 'prompt' with weights = 'policy' would be majority_vote with other draws: "
                "vote with other weights, or of = 'paraphrase'"
            )
        return None

    @rule("offline", "weights")
    def _kept(self) -> str | None:
        if self.offline and self.weights in ("policy", "ema"):
            return f"offline needs weights that stay the same, reference or servers, and weights is {self.weights!r}"
        return None


@register_provider
class Votes(Provider[VotesOptions]):
    """Takes the other vote and compares every answer with its winner."""

    name = "votes"
    provides = frozenset({CROSS_VOTE, NO_WINNER})
    Options = VotesOptions

    @property
    def asks(self) -> Weights:
        return self.options.weights

    def request(self, n: int, prompt: float, response: float) -> Request:
        return Request(1, prompt, "", self.options.samples, self.options.max_new_tokens, once=self.options.offline)

    @property
    def remembers(self) -> bool:
        """Offline, the winner on each prompt: servers would draw another one each time they are asked."""
        return self.options.offline

    def problems(self, prompts: Sequence[Prompt]) -> Iterator[str]:
        if self.options.of == "prompt":
            return
        absent = [prompt.id for prompt in prompts if "paraphrase_tokens" not in prompt.fields]
        if absent:
            yield (
                f"{len(absent)} of {len(prompts)} prompts have no paraphrase ({absent[0]!r} first), which the provider "
                "votes with of = 'paraphrase' asks about: complete data.train.paraphrase_field, or set of=prompt"
            )

    async def fetch(self, groups: Sequence[Group]) -> None:
        """RolloutFailed when the voters do not answer in time."""
        winners = self._winners([group for group in groups if group.prompt.id not in self.memory], groups)
        if self.remembers:
            self.memory |= winners
        winners |= self.memory
        for group in groups:
            winner = winners[group.prompt.id]
            fill(group, CROSS_VOTE, self._agree(group, winner))
            fill(group, NO_WINNER, [float(winner is None)] * len(group))

    def _winners(self, asked: Sequence[Group], batch: Sequence[Group]) -> dict[str, str | None]:
        """The winner of the other vote for each of `asked`, by the prompt's id."""
        options, context = self.options, self.context
        voters = context.respondent(options.weights, options.pool)
        seed = seed_of(context.seed, "votes", () if options.offline else batch)
        sampling = Sampling(options.samples, options.max_new_tokens, options.temperature, seed=seed)
        found = voters.generate([self._question(group.prompt) for group in asked], sampling) if asked else []
        winners: dict[str, str | None] = {}
        for group, other in zip(asked, found, strict=True):
            reader = context.answers_of(group.prompt)
            answers = [reader.extract(sample.text, finished=sample.finish == "stop") for sample in other.samples]
            winner = vote(reader.classes(answers)).winner
            winners[group.prompt.id] = None if winner is None else answers[winner]
        return winners

    def _question(self, prompt: Prompt) -> Prompt:
        tokens = prompt.tokens
        if self.options.of == "paraphrase":
            given = prompt.fields["paraphrase_tokens"]
            assert isinstance(given, list | tuple)
            tokens = tuple(given)
        return Prompt(f"{prompt.id}#votes", "", tokens)

    def _agree(self, group: Group, winner: str | None) -> list[float]:
        """1 for the answers equivalent to `winner`; each class is compared once, by its first member."""
        if winner is None:
            return [0.0] * len(group)
        equivalent = self.context.answers_of(group.prompt).equivalent
        same = {
            cls: float(equivalent(str(group.samples[place].answer), winner))
            for place, cls in reversed(list(enumerate(group.classes)))
            if cls is not None
        }
        return [0.0 if cls is None else same[cls] for cls in group.classes]


@register
class CoRewarding(Reward[NoOptions]):
    """1 for the answer that the other vote chose. Metric: `no_winner` (the other vote chose none, and pays nobody)."""

    name = "co_rewarding"
    needs = frozenset({CROSS_VOTE, NO_WINNER})
    formula = "1[answer(y) = majority of the responses to the paraphrase, or of the teacher's to the prompt]"
    value_range = BINARY
    source = "Co-rewarding I and II (arXiv 2508.00410)"

    def score(self, group: Group) -> torch.Tensor:
        return signal_of(self, group, CROSS_VOTE).to("cpu", torch.float32)

    def counts(self, groups: Sequence[Group], scores: Sequence[torch.Tensor]) -> Sequence[Mapping[str, float]]:
        return [{"no_winner": float(bool(signal_of(self, group, NO_WINNER).any()))} for group in groups]
