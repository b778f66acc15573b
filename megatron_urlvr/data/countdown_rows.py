"""Countdown problems from tables: columns with a target and numbers, as the public data sets have them.

    row {"target": 46, "nums": [25, 7, 3]} ─► question in words, fields for checkers, label "25,7,3=46"

There is no solution in such a row. Its label is the problem itself, and an answer is right when it solves it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..config.data import CountdownColumns, GradingSection
from .grading.extract import Place
from .grading.text import finder
from .tasks.base import Checker
from .tasks.countdown import CountdownChecks, CountdownGrader, solves

SIGNS = {"\\times": "*", "\\cdot": "*", "×": "*", "·": "*", "\\div": "/", "÷": "/", "−": "-", "–": "-"}
"""How models write what Python writes otherwise."""
LONGEST = 1000
"""Characters of an answer that is looked at; what is read in the end is at most `arithmetic.MAX_LENGTH`."""
_FRACTION = re.compile(r"\\[dtc]?frac(?![a-zA-Z])\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_DECORATION = re.compile(r"\\left|\\right|\\[,;!]|\$")


class CountdownFileGrader(CountdownGrader):
    """Finds answers as `grading.extract` says, and compares them as expressions."""

    def __init__(self, section: GradingSection) -> None:
        super().__init__()
        self._find = finder(section)

    def extract(self, text: str, *, finished: bool = True) -> str | None:
        """The expression found, in canonical form; None where there is none, or it is no expression."""
        place = self._find(text, finished)
        return None if place is None else super().extract(f"#{plain(text[place[0] : place[1]])}")

    def locate(self, text: str, *, finished: bool = True) -> Place | None:
        """Where the answer stands; None where `extract` finds none."""
        return None if self.extract(text, finished=finished) is None else self._find(text, finished)

    def correct(self, answer: str | None, label: str) -> bool:
        """Whether `answer` solves the problem `label`, written `25,7,3=46`."""
        numbers, _, target = label.partition("=")
        return answer is not None and solves(answer, tuple(map(int, numbers.split(","))), int(target))

    def checkers(self) -> Mapping[str, Checker]:
        """Those of the task `countdown`, on answers found as in this file."""
        return CountdownChecks(self.extract).by_name()


def plain(answer: str) -> str:
    r"""`answer` with the operations of Python: `3 \times 7` is `3 * 7`, `\frac{6}{2}` is `((6)/(2))`."""
    if len(answer) > LONGEST:
        return answer
    for written, sign in SIGNS.items():
        answer = answer.replace(written, sign)
    before = None
    while answer != before:  # fractions within fractions, the inner ones first
        before, answer = answer, _FRACTION.sub(_divided, answer)
    return _DECORATION.sub("", answer)


def _divided(fraction: re.Match[str]) -> str:
    over, digit_over, under, digit_under = fraction.groups()
    return f"(({over or digit_over})/({under or digit_under}))"


def read_problem(record: Mapping[str, object], columns: CountdownColumns) -> tuple[tuple[int, ...], int]:
    """Numbers and target of a row. ValueError with what completes "line 3 ..."."""
    numbers, target = record.get(columns.numbers_field), record.get(columns.target_field)
    if not isinstance(numbers, list) or not numbers or not all(map(_natural, numbers)):
        raise ValueError(
            f"has {numbers!r} under {columns.numbers_field!r}; a list of whole numbers from 0 up is expected"
        )
    if not isinstance(target, int) or isinstance(target, bool):
        raise ValueError(f"has {target!r} under {columns.target_field!r}; a whole number is expected")
    return tuple(numbers), target


def _natural(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def question_of(numbers: tuple[int, ...], target: int, columns: CountdownColumns) -> str:
    """The question in words."""
    listed = columns.separator.join(map(str, numbers))
    return columns.question.replace("{numbers}", listed).replace("{target}", str(target))


def label_of(numbers: tuple[int, ...], target: int) -> str:
    """The problem as a label, which `CountdownFileGrader.correct` reads."""
    return f"{','.join(map(str, numbers))}={target}"
