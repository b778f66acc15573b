"""The supervised reward that the label-free ones are compared with, and rewards that carry no truth at all."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from math import inf
from typing import Literal

import torch
from pydantic import Field

from megatron_urlvr.config.base import Section, rule
from megatron_urlvr.types import Group, Sample

from .base import ANSWER, BINARY, LABEL, PERMUTED_LABEL, NoOptions, Range, Reward, classes_of, signal_of
from .registry import register
from .voting import vote, vote_of

SPURIOUS = "Spurious Rewards (arXiv 2506.10947)"


@register
class GroundTruth(Reward[NoOptions]):
    """1 where the answer is right: ordinary RLVR, the upper line of every comparison."""

    name = "ground_truth"
    needs = frozenset({LABEL})
    supervised = True
    formula = "1[answer(y) is right]"
    value_range = BINARY
    source = "RLVR with labels"

    def score(self, group: Group) -> torch.Tensor:
        return signal_of(self, group, "correct").to("cpu", torch.float32)


class RandomOptions(Section):
    p: float = Field(default=0.5, ge=0, le=1)
    """Probability of a 1."""


@register
class Random(Reward[RandomOptions]):
    """A coin for each sample, drawn from the run's seed, the prompt's id, the sample's index and the version of its
    weights: the same whichever process scores the sample and whatever stands beside it, and another when the prompt is
    met again."""

    name = "random"
    needs = frozenset[str]()
    Options = RandomOptions
    formula = "Bernoulli(p)"
    value_range = BINARY
    source = SPURIOUS

    def score(self, group: Group) -> torch.Tensor:
        return torch.tensor([float(draw < self.options.p) for draw in _draws(self.seed, group, group.samples)])


@register
class Format(Reward[NoOptions]):
    """1 where an answer could be parsed, whatever it is."""

    name = "format"
    needs = frozenset({ANSWER})
    formula = "1[y has a parsable answer]"
    value_range = BINARY
    source = SPURIOUS

    def score(self, group: Group) -> torch.Tensor:
        return torch.tensor([float(cls is not None) for cls in classes_of(self, group)])


class LengthOptions(Section):
    target: float = Field(ge=0)
    """Tokens from which the length is counted; 0 takes the length itself."""
    sign: Literal[-1, 1]
    """-1 rewards responses near `target` (short ones at 0), 1 those far from it."""
    scale: float = Field(gt=0)
    """Tokens that make one unit of reward."""


@register
class Length(Reward[LengthOptions]):
    """Distance of the response's length from a target. All three options must be given."""

    name = "length"
    needs = frozenset[str]()
    Options = LengthOptions
    formula = "sign * |T - target| / scale"
    value_range = Range(-inf, inf, "sign +1: [0, inf); sign -1: (-inf, 0]")
    source = "control; a length penalty alone in arXiv 2603.16578"

    def score(self, group: Group) -> torch.Tensor:
        options = self.options
        return torch.tensor(
            [options.sign * abs(sample.length - options.target) / options.scale for sample in group.samples],
            dtype=torch.float64,
        )


class IncorrectOptions(Section):
    wrong: Literal["majority", "any"] = "majority"
    """`majority` pays the most frequent of the group's wrong answers, `any` every wrong answer."""


@register
class Incorrect(Reward[IncorrectOptions]):
    """1 for wrong answers. The source labels the data once, with wrong majority answers of the base model; here the
    wrong majority is that of the group itself. An unparsable response gets 0."""

    name = "incorrect"
    needs = frozenset({ANSWER, LABEL})
    supervised = True
    Options = IncorrectOptions
    formula = "1[class(y) = most frequent wrong class] | 1[y has a wrong answer]"
    value_range = BINARY
    source = SPURIOUS

    def score(self, group: Group) -> torch.Tensor:
        correct = signal_of(self, group, "correct").tolist()
        wrong = [None if right else cls for cls, right in zip(classes_of(self, group), correct, strict=True)]
        if self.options.wrong == "any":
            return torch.tensor([float(cls is not None) for cls in wrong])
        winner = vote(wrong, [sample.index for sample in group.samples]).winner
        return torch.tensor([float(winner is not None and cls == winner) for cls in wrong])


class FlippedOptions(Section):
    match: Literal["vote", "rates"] = "vote"
    """`vote`: in every group as many right and as many wrong responses are paid as the group's vote pays; `rates`: each
    right response with probability `recall`, each wrong one with probability `false_positive`."""
    recall: float | None = Field(default=None, ge=0, le=1)
    """Probability that a right response is paid, under `match: rates`."""
    false_positive: float | None = Field(default=None, ge=0, le=1)
    """Probability that a wrong response is paid, under `match: rates`."""

    @rule("match", "recall", "false_positive")
    def _rates(self) -> str | None:
        given = [name for name in ("recall", "false_positive") if getattr(self, name) is not None]
        if self.match == "vote" and given:
            return f"{given[0]} is read under match: rates alone, and match is 'vote'"
        if self.match == "rates" and len(given) < 2:
            return "match: rates needs recall and false_positive, as a run's audit measured them"
        return None


@register
class FlippedTruth(Reward[FlippedOptions]):
    """The truth with as many errors as the vote makes, but at random: what is left of a vote's effect when its errors
    agree with each other no longer. Draws depend on the run's seed, the prompt and the samples' indices alone."""

    name = "flipped_truth"
    needs = frozenset({ANSWER, LABEL})
    supervised = True
    Options = FlippedOptions
    formula = "1[y is among TP right and FP wrong responses drawn at random], TP and FP those of the group's vote"
    value_range = BINARY
    source = "control: label noise of a vote's precision and recall"

    def score(self, group: Group) -> torch.Tensor:
        right = [value > 0.5 for value in signal_of(self, group, "correct").tolist()]
        draws = _draws(self.seed, group, group.samples)
        if self.options.match == "rates":
            rate = {True: self.options.recall, False: self.options.false_positive}
            return torch.tensor([float(draw < (rate[r] or 0.0)) for draw, r in zip(draws, right, strict=True)])
        winner = vote_of(group).winner
        paid = [winner is not None and cls == winner for cls in classes_of(self, group)]
        scores = torch.zeros(len(group))
        for truth in (True, False):
            places = sorted((place for place, r in enumerate(right) if r is truth), key=lambda place: draws[place])
            count = sum(own for own, r in zip(paid, right, strict=True) if r is truth)
            scores[places[:count]] = 1.0
        return scores


@register
class PermutedTruth(Reward[NoOptions]):
    """The truth of another prompt: labels change hands once, by the run's seed. Right format and right statistics of
    the labels, and no information. No prompt keeps its own label."""

    name = "permuted_truth"
    needs = frozenset({PERMUTED_LABEL})
    supervised = True
    formula = "1[answer(y) is right for the prompt whose label this prompt was given]"
    value_range = BINARY
    source = "control"

    def score(self, group: Group) -> torch.Tensor:
        return signal_of(self, group, PERMUTED_LABEL).to("cpu", torch.float32)


def _draws(seed: int, group: Group, samples: Sequence[Sample]) -> list[float]:
    """A number in [0, 1) for each sample, from the seed, the prompt's id, the sample's index and its version alone."""
    key = hashlib.blake2b(f"{seed}\0{group.prompt.id}".encode(), digest_size=16).digest()
    names = (b"%d/%d" % (sample.version, sample.index) for sample in samples)
    return [int.from_bytes(hashlib.blake2b(name, digest_size=8, key=key).digest(), "big") / 2**64 for name in names]
