"""Rewards from programs: a task's own checkers, and unit tests run in a sandbox."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import torch
from pydantic import Field

from megatron_urlvr.config.base import Section
from megatron_urlvr.types import Group, Prompt

from .base import BINARY, NoOptions, Reward, signal_of
from .ensemble import CHECK
from .providers import Provider, fill, register_provider
from .registry import register
from .sandbox import Limits, Outcome, run_python, why_unavailable

STOPPED = "check_stopped"
"""Signal: 1 where the check was ended by a limit, `[n]` float32."""


class CheckerOptions(Section):
    checker: str = "answer"
    """Which of the task's checkers: `answer`, the whole truth; `countdown` has `numbers` and `value` too, each half of
    it; `chain_sum` has `steps`, the written steps alone."""


@register_provider
class TaskChecker(Provider[CheckerOptions]):
    """Asks the task that made a prompt whether a response holds. Instant, and without labels."""

    name = "checker"
    provides = frozenset({CHECK, STOPPED})
    Options = CheckerOptions

    def problems(self, prompts: Sequence[Prompt]) -> Iterator[str]:
        for prompt in prompts[:1]:
            known = sorted(self.context.checkers_of(prompt))
            if self.options.checker not in known:
                yield (
                    f"checker = {self.options.checker!r} is none of {', '.join(known)}, the checkers of this task"
                    if known
                    else "the provider checker needs prompts from a task, or of Countdown, and these are from a file: "
                    "use unit_tests, or a provider of your own"
                )

    async def fetch(self, groups: Sequence[Group]) -> None:
        for group in groups:
            check = self.context.checkers_of(group.prompt)[self.options.checker]
            cut = [sample.finish == "length" and sample.answer is None for sample in group.samples]
            verdicts = [
                False if half else check(group.prompt, sample.text)
                for half, sample in zip(cut, group.samples, strict=True)
            ]
            fill(group, CHECK, [float(bool(verdict)) for verdict in verdicts])
            fill(group, STOPPED, [0.0] * len(group))


class UnitTestOptions(Section):
    seconds: float = Field(default=10.0, gt=0)
    """Longest that one program may run, in seconds of a clock and of its processor."""
    memory_mb: int = Field(default=512, ge=64)
    """Most memory that it may take."""
    parallel: int = Field(default=4, ge=1)
    """Programs that run at once, on each replica."""
    program: Literal["code_block", "whole"] = "code_block"
    """Where the program stands: `code_block`, in the last ```python block of the response; `whole`, it is the whole
    response."""


@register_provider
class UnitTests(Provider[UnitTestOptions]):
    """Runs the program of every response, then the prompt's tests (`data.train.tests_field`), each in a process of its
    own that can write no file, start no process and reach no network.

    A program that a limit ended counts as wrong; the first of each kind is said on standard error.
    """

    name = "unit_tests"
    provides = frozenset({CHECK, STOPPED})
    Options = UnitTestOptions

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self._said: set[str] = set()

    def problems(self, prompts: Sequence[Prompt]) -> Iterator[str]:
        if (why := why_unavailable()) is not None:
            yield why
        absent = [prompt.id for prompt in prompts if not isinstance(prompt.fields.get("tests"), str)]
        if absent:
            yield (
                f"{len(absent)} of {len(prompts)} prompts have no tests ({absent[0]!r} first), which the provider "
                "unit_tests runs: name the column that holds them in data.train.tests_field"
            )

    async def fetch(self, groups: Sequence[Group]) -> None:
        limits = Limits(seconds=self.options.seconds, memory_mb=self.options.memory_mb)
        work = [(group, place) for group in groups for place in range(len(group))]
        with ThreadPoolExecutor(self.options.parallel) as threads:
            outcomes = await asyncio.gather(
                *(
                    asyncio.get_running_loop().run_in_executor(threads, self._run, group, place, limits)
                    for group, place in work
                )
            )
        found = dict(zip(((id(group), place) for group, place in work), outcomes, strict=True))
        for group in groups:
            own = [found[id(group), place] for place in range(len(group))]
            self._say(group, own)
            fill(group, CHECK, [float(outcome.kind == "passed") for outcome in own])
            fill(group, STOPPED, [float(outcome.stopped) for outcome in own])

    def _run(self, group: Group, place: int, limits: Limits) -> Outcome:
        text = group.samples[place].text
        program = text if self.options.program == "whole" else code_block(text)
        if program is None:
            return Outcome("failed", "no program")
        return run_python(f"{program}\n\n{group.prompt.fields['tests']}\n", limits)

    def _say(self, group: Group, outcomes: Sequence[Outcome]) -> None:
        for sample, outcome in zip(group.samples, outcomes, strict=True):
            if outcome.stopped and outcome.kind not in self._said:
                self._said.add(outcome.kind)
                print(
                    f"unit_tests: the program of sample {sample.index} of prompt {group.prompt.id!r} was stopped "
                    f"({outcome.detail}); it counts as wrong, and further ones in term/<label>/stopped",
                    file=sys.stderr,
                    flush=True,
                )


_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)


def code_block(text: str) -> str | None:
    """The last closed code block of `text`; None where there is none."""
    blocks = _BLOCK.findall(text)
    return blocks[-1] if blocks else None


@register
class Program(Reward[NoOptions]):
    """1 where the check holds: a task's checker, whole or partial, or unit tests. Metric: `stopped` (responses whose
    check a limit ended)."""

    name = "program"
    needs = frozenset({CHECK, STOPPED})
    formula = "1[the check of y passes]"
    value_range = BINARY
    source = "generation-verification asymmetry, URLVR (arXiv 2603.08660) section 7; TinyZero's Countdown scorer"

    def score(self, group: Group) -> torch.Tensor:
        return signal_of(self, group, CHECK).to("cpu", torch.float32)

    def counts(self, groups: Sequence[Group], scores: Sequence[torch.Tensor]) -> Sequence[Mapping[str, float]]:
        return [{"stopped": float(signal_of(self, group, STOPPED).double().mean())} for group in groups]
