"""The currency of the whole program: prompts, samples, groups and token statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Literal, NamedTuple

import torch

FinishReason = Literal["stop", "length"]
"""`stop`: the model ended its answer with an end-of-sequence token; `length`: `max_new_tokens` cut it off."""


@dataclass(frozen=True)
class Prompt:
    """A question as the policy sees it. Never carries the answer: labels live in the `LabelStore`, by `id`."""

    id: str
    text: str
    tokens: tuple[int, ...]
    fields: Mapping[str, object] = field(default_factory=dict)
    """What a checker may know besides the text (Countdown's numbers and target, say); never the label."""


@dataclass
class TokenStats:
    """Per-token statistics of one response under one policy: float32 `[T]` each, in nats; None where not asked for.

    With `z` the logits over temperature, `p = softmax(z)` and `V` the number of real vocabulary entries:
    `logp = z[y] - lse`, `entropy = -sum p log p`, `self_certainty = KL(U || p) = lse - mean(z) - log V`,
    `top2_gap = p_(1) - p_(2)` (a probability difference, no unit), `lse = log sum exp z`.
    """

    logp: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    self_certainty: torch.Tensor | None = None
    top2_gap: torch.Tensor | None = None
    lse: torch.Tensor | None = None

    def present(self) -> frozenset[str]:
        """Names of the statistics that were computed."""
        return frozenset(f.name for f in fields(self) if getattr(self, f.name) is not None)

    def get(self, name: str) -> torch.Tensor:
        """The statistic `name`, `[T]` float32. KeyError if it was not computed: a missing signal is never a zero."""
        value = getattr(self, name, None)
        if value is None:
            raise KeyError(f"token statistic {name!r} was not computed; present: {sorted(self.present())}")
        return value


STATISTICS: frozenset[str] = frozenset(f.name for f in fields(TokenStats))
"""Names a reward may list in `needs` that come from the policy's scoring pass."""


class Span(NamedTuple):
    """The tokens `start` to `end` (exclusive) of a response were sampled with the weights of `version`."""

    version: int
    start: int
    end: int


@dataclass
class Sample:
    """One response to one prompt."""

    prompt_id: str
    index: int
    """Position in the group, 0..n-1: the identity that ties are broken by, never the order of arrival."""
    tokens: list[int]
    """Response token ids, the end-of-sequence token included when the model produced it."""
    text: str
    """The decoded response, special tokens left out."""
    finish: FinishReason
    logp: torch.Tensor | None = None
    """`[T]` float32, nats: log-probabilities of `tokens` as the engine sampled them (at the rollout temperature)."""
    version: int = 0
    """Version of the weights that produced the last token."""
    answer: str | None = None
    """Extracted and normalised answer; None when the response has no parsable one."""
    stats: TokenStats | None = None
    spans: tuple[Span, ...] = ()
    """Which weights produced which tokens, in order, where they were updated meanwhile; empty: `version` did all."""

    @property
    def length(self) -> int:
        """Number of response tokens."""
        return len(self.tokens)

    @property
    def oldest(self) -> int:
        """Version of the oldest weights that produced a token."""
        return min((span.version for span in self.spans), default=self.version)

    def ages(self, version: int) -> list[tuple[int, int]]:
        """`(age, tokens)` of each span: by how many versions its weights are older than `version`."""
        spans = self.spans or (Span(self.version, 0, len(self.tokens)),)
        return [(version - span.version, span.end - span.start) for span in spans]


@dataclass
class Group:
    """All samples of one prompt, in index order: the unit of voting, rewards and advantages."""

    prompt: Prompt
    samples: list[Sample]
    classes: list[int | None] = field(default_factory=list)
    """Equivalence class of each sample's answer (the index of its first member); None where nothing was parsed."""
    signals: dict[str, torch.Tensor] = field(default_factory=dict)
    """What providers computed for this group, `[n]` float32 each, by signal name (`judge`, ...). `correct` is there
    only when a supervised reward asked for labels."""
    beside: list[Group] = field(default_factory=list)
    """Groups that a provider sampled from the policy about this one and may train it on: a judge's verdicts."""

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    @property
    def answers(self) -> list[str | None]:
        """Extracted answers in sample order."""
        return [sample.answer for sample in self.samples]

    def stat(self, name: str) -> list[torch.Tensor]:
        """The statistic `name` of each sample, a list of `[T_i]` tensors. KeyError where one was not computed."""
        out = []
        for sample in self.samples:
            if sample.stats is None:
                raise KeyError(f"sample {sample.prompt_id}/{sample.index} has no token statistics ({name!r} is needed)")
            out.append(sample.stats.get(name))
        return out


def samples_of(groups: Iterable[Group]) -> list[Sample]:
    """All samples of `groups`, group by group."""
    return [sample for group in groups for sample in group.samples]


@dataclass(frozen=True)
class Sampling:
    """How an engine samples. `seed` and a sample's identity decide its randomness, so batching never changes it."""

    n: int
    max_new_tokens: int
    temperature: float = 1.0
    """0 means greedy decoding."""
    top_p: float = 1.0
    seed: int = 0
    certain: int | None = None
    """The first so many samples are always completed; the others may be given up once they cannot change the majority.
    None: all are completed."""
