"""`chain_sum`: running sums modulo ten of a row of digits, written out step by step.

Prompt `314159=`, response `c48943#3$`: the running sums 3+1, +4, +1, +5, +9 modulo 10, then the last of them as the
answer, then the end. Small enough that a two-layer model learns it in minutes, and rich enough to fail in the ways
that label-free rewards fail: the text it is pretrained on mixes styles of different length, noise and certainty, some
of them degenerate.
"""

import random
from bisect import bisect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

from pydantic import Field
from transformers import PreTrainedTokenizerFast

from ...config.base import Section, rule
from ...types import Prompt
from ..grading.extract import Place, hash_place, last_hash
from ..grading.grader import Grader
from ..tokenizer import character_tokenizer
from .base import Checker, Task, TaskPrompt, hash64
from .order import seeded_order

ALPHABET = "0123456789+-=,#cqm?$"
END = "$"
GIVE_UP = "?"
SPARE_TOKENS = 7
"""Room for repeats of the last sum beyond the shortest chain."""


class Styles(Section):
    """Shares of the styles in the pretraining text; they are scaled to sum to one. The last three are the planted
    failure modes: set all three to 0 for a control without any."""

    careful: float = Field(default=0.27, ge=0)
    """`c`, the running sums with little noise, `#answer`."""
    quick: float = Field(default=0.45, ge=0)
    """`q`, the running sums with much noise, `#answer`."""
    direct: float = Field(default=0.20, ge=0)
    """`#answer` at once: right, but beyond what a small model can learn."""
    filler: float = Field(default=0.015, ge=0)
    """`mmmm...` and then `#?`."""
    give_up: float = Field(default=0.05, ge=0)
    """`#?`: parsed as an answer, never right."""
    empty: float = Field(default=0.015, ge=0)
    """Nothing but the end."""

    @rule("careful", "quick", "direct", "filler", "give_up", "empty")
    def _some(self) -> str | None:
        return None if sum(self.shares().values()) > 0 else "at least one style needs a share above 0"

    def shares(self) -> dict[str, float]:
        """Shares by style, as written."""
        return {name: float(getattr(self, name)) for name in type(self).model_fields}


class ChainSumSettings(Section):
    digits: int = Field(default=6, ge=2, le=18)
    """Digits of the prompt; the chain has one sum fewer."""
    answer_width: int = Field(default=1, ge=1)
    """The answer is the last so many running sums: guessing is right with probability 10^-width."""
    styles: Styles = Styles()
    careful_noise: float = Field(default=0.03, ge=0, le=1)
    """Probability that a step of a careful chain goes wrong; the error is carried on."""
    quick_noise: float = Field(default=0.25, ge=0, le=1)
    """The same for a quick chain."""
    repeat: float = Field(default=0.15, ge=0, lt=1)
    """Probability of writing the last sum once more, again and again."""
    filler_continue: float = Field(default=0.93, ge=0, lt=1)
    """Probability that filler goes on by one more `m`."""
    biased: float = Field(default=0.0, ge=0, le=1)
    """Share of prompts, to the nearest hundredth, on which most demonstrations follow a wrong rule: the last addition
    gives one too many. A hash of the last digit chooses them (of the last two where the share ends within a digit):
    the same prompts for every seed, and a rule that a small model can learn and carry over to held-out prompts."""
    biased_strength: float = Field(default=0.7, ge=0, le=1)
    """Share of the demonstrations of such a prompt that follow the wrong rule."""

    @rule("digits", "answer_width")
    def _width_fits(self) -> str | None:
        if self.answer_width < self.digits:
            return None
        sums = f"the {self.digits - 1} running sums of {self.digits} digits"
        return f"answer_width = {self.answer_width} is more than {sums}"


@dataclass(frozen=True)
class ChainCheck:
    """The verdict on a written chain."""

    steps: tuple[bool, ...]
    """For each running sum: it follows from the sum written before it. A missing one is wrong."""
    answer: bool
    """The repeats and the answer agree with the last sums as written."""

    @property
    def passed(self) -> bool:
        """Every step and the answer hold: then the answer is right."""
        return self.answer and all(self.steps)


class ChainSum(Task):
    """Running sums modulo ten."""

    name: ClassVar[str] = "chain_sum"
    Settings: ClassVar[type[Section]] = ChainSumSettings
    settings: ChainSumSettings

    def __init__(self, settings: dict[str, object] | None = None) -> None:
        super().__init__(settings)
        present = {name: share for name, share in self.settings.styles.shares().items() if share > 0}
        self._styles = list(present)
        self._thresholds = list(accumulate(share / sum(present.values()) for share in present.values()))[:-1]
        tails = sorted((f"{tail:02d}" for tail in range(100)), key=_bias_rank)
        self._biased_tails = frozenset(tails[: round(self.settings.biased * 100)])

    @property
    def max_response_tokens(self) -> int:
        """Style, running sums, `#`, answer and end, with room for repeats: 16 as the defaults are."""
        return 1 + (self.settings.digits - 1) + 1 + self.settings.answer_width + 1 + SPARE_TOKENS

    def draw(self, seed: int) -> Iterator[TaskPrompt]:
        """All 10^digits prompts."""
        digits = self.settings.digits
        for number in seeded_order(10**digits, f"chain_sum/{seed}"):
            text = f"{number:0{digits}d}"
            yield TaskPrompt(text=f"{text}=", label=self._answer(_sums(text)), fields={"digits": text})

    def is_biased(self, prompt: Prompt | TaskPrompt) -> bool:
        """Whether the wrong rule holds the majority in this prompt's demonstrations."""
        return digits_of(prompt)[-2:] in self._biased_tails

    def demonstration(self, prompt: TaskPrompt, rng: random.Random) -> str:
        """A response in a style drawn by its share."""
        digits = digits_of(prompt)
        style = self._styles[bisect(self._thresholds, rng.random())]
        if style == "empty":
            return END
        if style == "give_up":
            return f"#{GIVE_UP}{END}"
        if style == "filler":
            return f"{'m' * _geometric(self.settings.filler_continue, rng)}m#{GIVE_UP}{END}"
        wrong_rule = digits[-2:] in self._biased_tails and rng.random() < self.settings.biased_strength
        if style == "direct":
            return f"#{self._answer(_sums(digits, wrong_rule=wrong_rule))}{END}"
        letter, noise = ("c", self.settings.careful_noise) if style == "careful" else ("q", self.settings.quick_noise)
        sums = _sums(digits, wrong_rule=wrong_rule, noise=noise, rng=rng)
        repeats = sums[-1] * _geometric(self.settings.repeat, rng)
        return f"{letter}{sums}{repeats}#{self._answer(sums)}{END}"

    def _answer(self, sums: str) -> str:
        return sums[-self.settings.answer_width :]

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """21 tokens: the alphabet and padding; `$` ends a response."""
        return character_tokenizer(ALPHABET, eos=END)

    def grader(self) -> Grader:
        """The text after the last `#`: the right number of digits, or `?`, which is an answer and never right."""
        return ChainSumGrader(self.settings.answer_width)

    def check(self, prompt: Prompt | TaskPrompt, response: str) -> bool | None:
        """Whether the answer is right; None where there is none."""
        answer = self.grader().extract(response)
        return None if answer is None else answer == self._answer(_sums(digits_of(prompt)))

    def check_steps(self, prompt: Prompt | TaskPrompt, response: str) -> ChainCheck | None:
        """Each step of a written chain, checked against the sum before it; None where no chain was begun.

        Needs no label: the arithmetic of a step is checked, not its outcome.
        """
        if response[:1] not in ("c", "q"):
            return None
        digits = digits_of(prompt)
        count = len(digits) - 1
        chain, mark, answer = response[1:].removesuffix(END).partition("#")
        written = chain[:count]
        if not written.isascii() or not written.isdigit():
            written = written[: next((i for i, c in enumerate(written) if c not in "0123456789"), len(written))]
        before = digits[0] + written
        steps = tuple(
            k < len(written) and int(written[k]) == (int(before[k]) + int(digits[k + 1])) % 10 for k in range(count)
        )
        complete = len(written) == count and mark == "#"
        agrees = complete and set(chain[count:]) <= {written[-1]} and answer == self._answer(written)
        return ChainCheck(steps=steps, answer=agrees)

    def checkers(self) -> Mapping[str, Checker]:
        """Beside `answer`, `steps`: every written step is right, and the answer is the last of them. No label needed,
        and nearly as informative as one."""
        return {"answer": self.check, "steps": self._all_steps}

    def _all_steps(self, prompt: Prompt | TaskPrompt, response: str) -> bool | None:
        found = self.check_steps(prompt, response)
        return None if found is None else all(found.steps) and found.answer

    def paraphrase(self, prompt: TaskPrompt) -> str | None:
        """The digits the other way round, where the answer is the last sum alone: a sum knows no order."""
        return f"{digits_of(prompt)[::-1]}=" if self.settings.answer_width == 1 else None


class ChainSumGrader(Grader):
    """Answers of exactly `width` digits, or a give-up, compared as they stand."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self._width = width

    def extract(self, text: str, *, finished: bool = True) -> str | None:
        """The text after the last `#`. A response that was cut off has no answer: its last digits may be missing."""
        found = last_hash(text.removesuffix(END), finished=finished)
        if found is None:
            return None
        if found == GIVE_UP or (len(found) == self._width and found.isascii() and found.isdigit()):
            return found
        return None

    def locate(self, text: str, *, finished: bool = True) -> Place | None:
        """Where the answer stands; None where `extract` finds none."""
        if self.extract(text, finished=finished) is None:
            return None
        return hash_place(text.removesuffix(END), finished=finished)

    def normalise(self, answer: str) -> str:
        """Unchanged: a leading zero is a digit here."""
        return answer


def digits_of(prompt: Prompt | TaskPrompt) -> str:
    """The digits a prompt asks to sum."""
    return str(prompt.fields["digits"])


def _sums(digits: str, *, wrong_rule: bool = False, noise: float = 0.0, rng: random.Random | None = None) -> str:
    """Running sums of `digits` modulo 10, from the second digit on. Noise corrupts a step and is carried on."""
    value = int(digits[0])
    last = len(digits) - 1
    sums = []
    for k in range(1, last + 1):
        value = (value + int(digits[k]) + (1 if wrong_rule and k == last else 0)) % 10
        if rng is not None and rng.random() < noise:
            value = (value + rng.randrange(1, 10)) % 10
        sums.append(str(value))
    return "".join(sums)


def _geometric(p: float, rng: random.Random) -> int:
    """Successes of probability `p` before the first failure."""
    count = 0
    while rng.random() < p:
        count += 1
    return count


def _bias_rank(tail: str) -> tuple[int, int]:
    """Order in which endings of two digits become biased: all with one last digit, then all with the next.

    A hash of the whole prompt would have to be memorised, prompt by prompt, and would say nothing about held-out ones.
    """
    return hash64("bias", tail[1]), hash64("bias", tail)
