"""`countdown`: reach a target from given numbers with `+ - * /`, each number used exactly once.

Prompt `25,7,3=46:`, response `25-7+3=21;25+7*3=46#25+7*3$`: attempts with their values, then the expression that is
the answer. Easy to check and hard to solve: the asymmetry that self-verification lives on. Numbers are used exactly
once, as in TinyZero (github.com/Jiayi-Pan/TinyZero), whose task it is.

A base can be taught to judge as well: after `25,7,3=46:#25+7*3@` comes a verdict, `T` or `F`.
"""

import random
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar, Literal, cast

from pydantic import Field
from transformers import PreTrainedTokenizerFast

from ...config.base import Section, rule
from ...types import Prompt
from ..grading.extract import Place, hash_place, last_hash
from ..grading.grader import Grader
from ..tokenizer import character_tokenizer
from .arithmetic import parse, random_expression
from .base import Checker, Task, TaskPrompt

ALPHABET = "0123456789+-*/()=,:;#?@TF$"
END = "$"
GIVE_UP = "?"
ASK = "@"
"""After a question and a response to it: asks for a verdict."""
RIGHT, WRONG = "T", "F"
LARGEST_ATTEMPT = 999
"""Values of attempts lie between 0 and this."""
PATIENCE = 20_000
"""Draws without a new prompt after which there are taken to be no more."""


class CountdownStyles(Section):
    """Shares of the styles in the pretraining text; they are scaled to sum to one. All but the first two are noise."""

    search: float = Field(default=0.35, ge=0)
    """Failed attempts, one to `attempts` of them, the solution with its value, then the answer."""
    direct: float = Field(default=0.25, ge=0)
    """The answer at once."""
    wrong_target: float = Field(default=0.20, ge=0)
    """An attempt, then an answer that uses the numbers rightly and misses the target."""
    wrong_number: float = Field(default=0.10, ge=0)
    """An answer in which one number is replaced by another."""
    malformed: float = Field(default=0.05, ge=0)
    """An answer that is no expression."""
    give_up: float = Field(default=0.05, ge=0)
    """`#?`: parsed as an answer, never right."""
    copied: float = Field(default=0.0, ge=0)
    """The target itself as the answer: its value is right, its numbers are not."""

    @rule("search", "direct", "wrong_target", "wrong_number", "malformed", "give_up", "copied")
    def _some(self) -> str | None:
        return None if sum(self.shares().values()) > 0 else "at least one style needs a share above 0"

    def shares(self) -> dict[str, float]:
        """Shares by style, as written."""
        return {name: float(getattr(self, name)) for name in type(self).model_fields}


class JudgementSettings(Section):
    """Judgements in the pretraining text: a prompt, a demonstration's response to it, `@`, and `T` or `F`. Half of the
    responses are right."""

    share: float = Field(default=0.0, ge=0, le=1)
    """Share of the examples that are judgements."""
    accuracy: float = Field(default=1.0, ge=0, le=1)
    """Probability that a verdict is the true one; at 0.5 they teach how to answer and nothing about what is right."""


class CountdownSettings(Section):
    counts: list[Literal[3, 4]] = Field(default=[3, 4], min_length=1)
    """How many numbers a prompt may have, each count equally often."""
    max_number: int = Field(default=20, ge=2, le=99)
    """Numbers lie between 1 and this."""
    max_target: int = Field(default=100, ge=1, le=999)
    """Targets lie between 1 and this."""
    operations: list[Literal["+", "-", "*", "/"]] = Field(default=["+", "-", "*", "/"], min_length=1)
    """Operations that solutions and attempts are made with. An answer may use all four."""
    attempts: int = Field(default=2, ge=1, le=4)
    """Most failed attempts that a demonstration writes down."""
    styles: CountdownStyles = CountdownStyles()
    judgements: JudgementSettings = JudgementSettings()

    @rule("operations")
    def _always_possible(self) -> str | None:
        if set(self.operations) == {"/"}:
            return "operations = ['/'] alone hardly ever leaves an integer: add another"
        return None


class Countdown(Task):
    """Reach a target from three or four numbers. The label is one solution; any other is as right."""

    name: ClassVar[str] = "countdown"
    Settings: ClassVar[type[Section]] = CountdownSettings
    settings: CountdownSettings

    def __init__(self, settings: dict[str, object] | None = None) -> None:
        super().__init__(settings)
        present = {name: share for name, share in self.settings.styles.shares().items() if share > 0}
        self._styles = list(present)
        self._thresholds = list(accumulate(share / sum(present.values()) for share in present.values()))[:-1]

    @property
    def max_response_tokens(self) -> int:
        """All attempts, the solution with its value, and the answer, each as long as it can be: 76 by default."""
        count = max(self.settings.counts)
        expression = count * len(str(self.settings.max_number)) + (count - 1) + 2 * (count - 2)
        attempt = expression + 1 + len(str(LARGEST_ATTEMPT)) + 1
        return (
            self.settings.attempts * attempt + expression + 1 + len(str(self.settings.max_target)) + 1 + expression + 1
        )

    def draw(self, seed: int) -> Iterator[TaskPrompt]:
        """Prompts that have a solution, since each is made from one."""
        rng = random.Random(f"countdown/{seed}")
        seen: set[str] = set()
        idle = 0
        while idle < PATIENCE:
            idle += 1
            count = rng.choice(self.settings.counts)
            numbers = sorted((rng.randint(1, self.settings.max_number) for _ in range(count)), reverse=True)
            made = self._expression(numbers, rng, low=1, high=self.settings.max_target, tries=1)
            if made is None:
                continue
            solution, target = made
            text = f"{','.join(map(str, numbers))}={target}:"
            if text not in seen:
                seen.add(text)
                idle = 0
                yield TaskPrompt(text=text, label=solution, fields={"numbers": tuple(numbers), "target": target})

    def demonstration(self, prompt: TaskPrompt, rng: random.Random) -> str:
        """A response in a style drawn by its share; `prompt` needs its label, the solution."""
        if prompt.label is None:
            raise ValueError(f"prompt {prompt.text!r} has no label: a demonstration shows the solution")
        numbers, target = problem_of(prompt)
        style = self._styles[bisect(self._thresholds, rng.random())]
        if style == "give_up":
            return f"#{GIVE_UP}{END}"
        if style == "direct":
            return f"#{prompt.label}{END}"
        if style == "search":
            count = rng.randint(1, self.settings.attempts)
            attempts = "".join(self._attempt(numbers, target, rng) for _ in range(count))
            return f"{attempts}{prompt.label}={target}#{prompt.label}{END}"
        if style == "wrong_target":
            attempt = self._attempt(numbers, target, rng)
            return f"{attempt}#{attempt.partition('=')[0] or GIVE_UP}{END}"
        if style == "wrong_number":
            others = [*numbers[1:], rng.randint(1, self.settings.max_number)]
            made = self._expression(others, rng)
            return f"#{made[0] if made else GIVE_UP}{END}"
        if style == "copied":
            return f"#{target}{END}"
        return f"#{_broken(prompt.label, rng)}{END}"

    def _attempt(self, numbers: tuple[int, ...], target: int, rng: random.Random) -> str:
        """A failed attempt, `expression=value;`; empty in the rare case that none is found."""
        for _ in range(10):
            made = self._expression(numbers, rng)
            if made is not None and made[1] != target:
                return f"{made[0]}={made[1]};"
        return ""

    def _expression(
        self, numbers: Sequence[int], rng: random.Random, *, low: int = 0, high: int = LARGEST_ATTEMPT, tries: int = 20
    ) -> tuple[str, int] | None:
        operations = "".join(self.settings.operations)
        return random_expression(numbers, rng, low=low, high=high, tries=tries, operations=operations)

    def example(self, prompt: TaskPrompt, rng: random.Random) -> tuple[str, str]:
        """A demonstration, or by `judgements.share` a judgement of one."""
        judgements = self.settings.judgements
        if not judgements.share or rng.random() >= judgements.share:
            return super().example(prompt, rng)
        wanted = rng.random() < 0.5
        for _ in range(20):
            response = self.demonstration(prompt, rng).removesuffix(END)
            right = self.check(prompt, response) is True
            if right == wanted:
                break
        said = right if rng.random() < judgements.accuracy else not right
        return self.judge_text(prompt, response), f"{RIGHT if said else WRONG}{END}"

    def judge_text(self, prompt: Prompt | TaskPrompt, response: str) -> str:
        """Question, response and `@`: under the provider `judge`, `template: "{question}{response}@"`."""
        return f"{prompt.text}{response}{ASK}"

    def verdict(self, text: str) -> bool | None:
        """`T` or `F`, and nothing else."""
        return {RIGHT: True, WRONG: False}.get(text.removesuffix(END).strip())

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """27 tokens: the alphabet and padding; `$` ends a response."""
        return character_tokenizer(ALPHABET, eos=END)

    def grader(self) -> Grader:
        """The expression after the last `#`, in canonical form; or `?`, which is an answer and never right."""
        return CountdownGrader()

    def check(self, prompt: Prompt | TaskPrompt, response: str) -> bool | None:
        """Whether the answer uses each number exactly once and reaches the target; None where there is no answer."""
        return CountdownChecks(CountdownGrader().extract).answer(prompt, response)

    def checkers(self) -> Mapping[str, Checker]:
        """See CountdownChecks."""
        return CountdownChecks(CountdownGrader().extract).by_name()

    def paraphrase(self, prompt: TaskPrompt) -> str:
        """The numbers the other way round."""
        numbers, target = problem_of(prompt)
        return f"{','.join(map(str, reversed(numbers)))}={target}:"


class CountdownGrader(Grader):
    """Answers are expressions; the same one in another order or with other parentheses is the same answer."""

    def extract(self, text: str, *, finished: bool = True) -> str | None:
        """The expression after the last `#`; None where there is none, or the response was cut off within it."""
        found = last_hash(text.removesuffix(END), finished=finished)
        if found is None or found == GIVE_UP:
            return found
        expression = parse(found)
        return None if expression is None else expression.canonical

    def locate(self, text: str, *, finished: bool = True) -> Place | None:
        """Where the expression stands; None where `extract` finds none."""
        if self.extract(text, finished=finished) is None:
            return None
        return hash_place(text.removesuffix(END), finished=finished)

    def normalise(self, answer: str) -> str:
        """The canonical form of an expression; any other text as it stands."""
        expression = parse(answer)
        return answer.strip() if expression is None else expression.canonical

    def correct(self, answer: str | None, label: str) -> bool:
        """Whether `answer` uses the numbers of the solution `label`, each as often, and reaches its value."""
        solution = parse(label)
        if answer is None or solution is None or solution.value is None:
            return False
        return solves(answer, solution.numbers, solution.value)


@dataclass(frozen=True)
class CountdownChecks:
    """Checks of a response: `answer`, and its two halves. A policy that is paid for one half alone learns to answer
    without the other. Each is None where there is no answer."""

    extract: Callable[[str], str | None]
    """Finds the answer in a response, in canonical form."""

    def by_name(self) -> Mapping[str, Checker]:
        return {"answer": self.answer, "numbers": self.numbers, "value": self.value}

    def answer(self, prompt: Prompt | TaskPrompt, response: str) -> bool | None:
        """The answer uses each number exactly once and equals the target."""
        found = self.extract(response)
        return None if found is None else solves(found, *problem_of(prompt))

    def numbers(self, prompt: Prompt | TaskPrompt, response: str) -> bool | None:
        """The answer uses each number exactly once, whatever it equals."""
        found = self.extract(response)
        if found is None:
            return None
        expression = parse(found)
        return expression is not None and expression.numbers == tuple(sorted(problem_of(prompt)[0]))

    def value(self, prompt: Prompt | TaskPrompt, response: str) -> bool | None:
        """The answer equals the target, whatever numbers it uses."""
        found = self.extract(response)
        if found is None:
            return None
        expression = parse(found)
        return expression is not None and expression.value == problem_of(prompt)[1]


def solves(answer: str, numbers: tuple[int, ...], target: object) -> bool:
    """Whether the expression `answer` uses each of `numbers` exactly once and equals `target` exactly."""
    expression = parse(answer)
    return expression is not None and expression.numbers == tuple(sorted(numbers)) and expression.value == target


def problem_of(prompt: Prompt | TaskPrompt) -> tuple[tuple[int, ...], int]:
    """Numbers and target that a prompt gives."""
    numbers = cast(Sequence[int], prompt.fields["numbers"])
    return tuple(numbers), cast(int, prompt.fields["target"])


def _broken(expression: str, rng: random.Random) -> str:
    """`expression` with an operator too many or a number too few, so that it is none any more."""
    places = [i for i, character in enumerate(expression) if character in "+-*/"]
    place = rng.choice(places)
    if rng.random() < 0.5:
        return f"{expression[: place + 1]}{rng.choice('*/')}{expression[place + 1 :]}"
    return expression[: place + 1]
