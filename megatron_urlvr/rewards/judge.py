"""Self-verification: a model is asked whether a response is right, and its verdict is the reward.

The model may be the policy itself (its verdicts then move with it), its starting weights, their moving average, or
another model on servers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field, field_validator

from megatron_urlvr.config.base import Section, rule
from megatron_urlvr.types import Group, Prompt, Sample, Sampling

from .base import NoOptions, Reward, signal_of
from .providers import Provider, Weights, fill, register_provider, seed_of
from .registry import register

JUDGE = "judge"
"""Signal: share of a judge's answers that say yes, `[n]` float32 in 0..1."""
UNPARSABLE = "judge_unparsable"
"""Signal: share of a judge's answers that are no verdict, `[n]` float32 in 0..1."""
TEMPLATE = """Decide whether the solution answers the question correctly. Check every step and the final answer.
Question: {question}
Solution: {response}
End with \\boxed{True} if the final answer is correct, or \\boxed{False} if it is not."""

Verdict = Literal["yes", "no"]


class JudgeOptions(Section):
    weights: Weights = "policy"
    """Who judges: `policy`, as it is at each step; `reference`, its starting weights; `ema`, their moving average
    (`optim.ema_decay`); `servers`, the model of a pool of servers, which never changes."""
    pool: str = "judge"
    """The pool of `servers.pools` that answers under `weights: servers`."""
    template: str = TEMPLATE
    """Text of the judge's prompt. `{question}` and `{response}` are replaced, every other brace stays as it is."""
    chat: bool = False
    """Put the text into one user message under the tokenizer's chat template."""
    verdict: Literal["boxed", "whole"] = "boxed"
    r"""Where the verdict stands: `boxed`, in `\\boxed{}`; `whole`, it is the whole answer."""
    yes: str = "True"
    """The verdict on a right response, compared without regard to case."""
    no: str = "False"
    """The verdict on a wrong one."""
    samples: int = Field(default=1, ge=1)
    """Verdicts asked for each response; the reward is the share of yes."""
    temperature: float = Field(default=0.5, ge=0)
    """Sampling temperature of the judge; 0 is greedy."""
    max_new_tokens: int = Field(ge=1)
    """Longest answer of the judge, in tokens."""

    @field_validator("template")
    @classmethod
    def _has_slots(cls, value: str) -> str:
        if absent := [slot for slot in ("{question}", "{response}") if slot not in value]:
            raise ValueError(f"must contain the placeholder {' and '.join(absent)}")
        return value

    @rule("yes", "no")
    def _differ(self) -> str | None:
        if self.yes.strip().casefold() == self.no.strip().casefold() or not self.yes.strip() or not self.no.strip():
            return f"yes = {self.yes!r} and no = {self.no!r} must be two different words"
        return None


@register_provider
class Judge(Provider[JudgeOptions]):
    """Asks a model about every response. A response whose prompt to the judge would be longer than the judge can read
    is not asked about: it has no verdict."""

    name = "judge"
    provides = frozenset({JUDGE, UNPARSABLE})
    Options = JudgeOptions

    @property
    def asks(self) -> Weights:
        return self.options.weights

    async def fetch(self, groups: Sequence[Group]) -> None:
        """One prompt to the judge for each response; RolloutFailed when the judge does not answer in time."""
        options = self.options
        judge = self.context.respondent(options.weights, options.pool)
        asked: dict[tuple[int, int], Prompt] = {}
        for g, group in enumerate(groups):
            for k, sample in enumerate(group.samples):
                tokens = judge.encode(judge_text(options.template, group.prompt, sample), chat=options.chat)
                if len(tokens) + options.max_new_tokens <= judge.context:
                    asked[g, k] = Prompt(f"{group.prompt.id}#judge{sample.index}", "", tokens)
        sampling = Sampling(
            options.samples, options.max_new_tokens, options.temperature, seed=seed_of(self.context.seed, JUDGE, groups)
        )
        answered = judge.generate(list(asked.values()), sampling) if asked else []
        found = dict(zip(asked, answered, strict=True))
        for g, group in enumerate(groups):
            verdicts = [
                [read_verdict(answer.text, options) for answer in found[g, k].samples] if (g, k) in found else [None]
                for k in range(len(group))
            ]
            fill(group, JUDGE, [each.count("yes") / len(each) for each in verdicts])
            fill(group, UNPARSABLE, [each.count(None) / len(each) for each in verdicts])


def judge_text(template: str, prompt: Prompt, sample: Sample) -> str:
    """What the judge reads. Question and response are put in as they are, whatever braces they hold."""
    question = str(prompt.fields.get("question", prompt.text))
    before, _, rest = template.partition("{question}")
    if "{response}" in before:
        head, _, between = before.partition("{response}")
        return f"{head}{sample.text}{between}{question}{rest}"
    between, _, after = rest.partition("{response}")
    return f"{before}{question}{between}{sample.text}{after}"


def read_verdict(text: str, options: JudgeOptions) -> Verdict | None:
    """The verdict in a judge's answer; None when it says neither, or both."""
    if options.verdict == "whole":
        said = {text.strip().casefold()}
    else:
        said = {piece.strip().casefold() for piece in _boxes(text)}
    yes, no = options.yes.strip().casefold() in said, options.no.strip().casefold() in said
    if yes == no:
        return None
    return "yes" if yes else "no"


def _boxes(text: str) -> list[str]:
    r"""Contents of all `\\boxed{...}` without braces inside."""
    pieces = text.split("\\boxed{")[1:]
    return [piece.partition("}")[0] for piece in pieces if "}" in piece]


@register
class SelfVerification(Reward[NoOptions]):
    """Share of the judge's verdicts that say the response is right. No verdict counts as no. Metrics: `unparsable`,
    `unanimous` (the judge says the same of every response, which teaches nothing)."""

    name = "self_verification"
    needs = frozenset({JUDGE, UNPARSABLE})
    formula = "share of yes among the verdicts on y"
    value_range = "[0, 1]; {0, 1} with one verdict"
    source = "URLVR (arXiv 2603.08660) section 7; RLSR (arXiv 2505.08827)"

    def score(self, group: Group) -> torch.Tensor:
        return signal_of(self, group, JUDGE).to("cpu", torch.float64)

    def counts(self, groups: Sequence[Group], scores: Sequence[torch.Tensor]) -> Sequence[Mapping[str, float]]:
        return [
            {
                "unparsable": math.fsum(signal_of(self, group, UNPARSABLE).tolist()) / len(group),
                "unanimous": float(bool((own == own[0]).all())),
            }
            for group, own in zip(groups, scores, strict=True)
        ]
