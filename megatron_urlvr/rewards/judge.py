"""Self-verification: a model is asked whether a response is right, and its verdict is the reward.

The model may be the policy itself (its verdicts then move with it), its starting weights, their moving average, or
another model on servers. The policy's verdicts can be trained as well, in the update that its responses are trained in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field, field_validator

from megatron_urlvr.config.base import rule
from megatron_urlvr.data.grading.extract import all_boxed
from megatron_urlvr.data.grading.normalise import normalise
from megatron_urlvr.types import Group, Prompt, Sample, Sampling

from .base import NoOptions, Range, Reward, classes_of, signal_of
from .ensemble import CHECK
from .providers import AskedOptions, Lesson, Provider, Request, Weights, fill, register_provider, seed_of
from .registry import register
from .voting import vote_of

JUDGE = "judge"
"""Signal: share of a judge's answers that say yes, `[n]` float32 in 0..1."""
UNPARSABLE = "judge_unparsable"
"""Signal: share of a judge's answers that are no verdict, `[n]` float32 in 0..1."""
TEMPLATE = """Decide whether the solution answers the question correctly. Check every step and the final answer.
Question: {question}
Solution: {response}
End with \\boxed{True} if the final answer is correct, or \\boxed{False} if it is not."""

Verdict = Literal["yes", "no"]


class JudgeOptions(AskedOptions):
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
    cotrain: Literal["vote", "check"] | None = None
    """Train the policy on its own verdicts too, beside its responses. A verdict's reward is 1 where it agrees with the
    vote (yes on the majority's responses, no on all others) or with the signal `check` of another provider, else 0; its
    advantage compares it with the other verdicts on the same response. None: verdicts are not trained on."""

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

    @rule("cotrain", "weights")
    def _trains_itself(self) -> str | None:
        if self.cotrain is not None and self.weights != "policy":
            return (
                f"cotrain = {self.cotrain!r} with weights = {self.weights!r}: the policy is what is trained; set "
                "weights=policy, or leave cotrain out"
            )
        return None

    @rule("cotrain", "samples")
    def _verdicts_to_compare(self) -> str | None:
        if self.cotrain is not None and self.samples < 2:
            return (
                f"cotrain = {self.cotrain!r} with samples = {self.samples}: a verdict's advantage compares it with the "
                "others on the same response; set samples to 2 or more"
            )
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

    def request(self, n: int, prompt: float, response: float) -> Request:
        text = self.options.template.replace("{question}", "").replace("{response}", "")
        return Request(n, prompt + response, text, self.options.samples, self.options.max_new_tokens)

    @property
    def teaches(self) -> bool:
        return self.options.cotrain is not None

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({CHECK}) if self.options.cotrain == "check" else frozenset()

    async def fetch(self, groups: Sequence[Group]) -> None:
        """One prompt to the judge for each response; RolloutFailed when the judge does not answer in time."""
        options = self.options
        judge = self.context.respondent(options.weights, options.pool)
        asked: dict[tuple[int, int], Prompt] = {}
        for g, group in enumerate(groups):
            for k, sample in enumerate(group.samples):
                tokens = judge.encode(judge_text(options.template, group.prompt, sample), chat=options.chat)
                if len(tokens) + options.max_new_tokens <= judge.context:
                    asked[g, k] = Prompt(_asked_about(sample), "", tokens)
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
            if self.teaches:
                group.beside += [found[g, k] for k in range(len(group)) if (g, k) in found]

    def lessons(self, group: Group) -> list[Lesson]:
        """The verdicts on as many responses that deserve a yes as on ones that deserve a no, the first of each in the
        group's order: else whichever is rarer would be forgotten. None where all deserve the same, or nobody votes."""
        given = {each.prompt.id: each for each in group.beside}
        asked = [sample for sample in group.samples if _asked_about(sample) in given]
        deserved = self._deserved(group)
        yes = [sample for sample in asked if deserved.get(sample.index) == "yes"]
        no = [sample for sample in asked if deserved.get(sample.index) == "no"]
        pairs = min(len(yes), len(no))
        chosen = sorted(yes[:pairs] + no[:pairs], key=lambda sample: sample.index)
        return [self._lesson(given[_asked_about(sample)], deserved[sample.index]) for sample in chosen]

    def _deserved(self, group: Group) -> dict[int, Verdict]:
        """What each response deserves by the vote or the check, by index; empty where nobody votes."""
        if self.options.cotrain == "check":
            right = [value > 0.5 for value in signal_of(self, group, CHECK).tolist()]
        else:
            classes, winner = classes_of(self, group), vote_of(group).winner
            right = [] if winner is None else [cls == winner for cls in classes]
        return {sample.index: "yes" if good else "no" for sample, good in zip(group.samples, right, strict=False)}

    def _lesson(self, verdicts: Group, deserved: Verdict) -> Lesson:
        agree = [read_verdict(sample.text, self.options) == deserved for sample in verdicts.samples]
        return Lesson(verdicts, torch.tensor(agree, dtype=torch.float32))


def _asked_about(sample: Sample) -> str:
    """Identity of the judge's prompt about a response."""
    return f"{sample.prompt_id}#judge{sample.index}"


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
    r"""The verdict in a judge's answer; None when it says neither, or both. What stands in a box may be written as
    any answer may: `\boxed{\text{True}}`."""
    if options.verdict == "whole":
        said = {text.strip().casefold()}
    else:
        said = {words.casefold() for content in all_boxed(text) for words in (content, normalise(content))}
    yes, no = options.yes.strip().casefold() in said, options.no.strip().casefold() in said
    if yes == no:
        return None
    return "yes" if yes else "no"


@register
class SelfVerification(Reward[NoOptions]):
    """Share of the judge's verdicts that say the response is right. No verdict counts as no. Metrics: `unparsable`,
    `unanimous` (the judge says the same of every response, which teaches nothing)."""

    name = "self_verification"
    needs = frozenset({JUDGE, UNPARSABLE})
    formula = "share of yes among the verdicts on y"
    value_range = Range(0, 1, "[0, 1]; {0, 1} with one verdict")
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
