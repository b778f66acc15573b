"""The grader of files: answers in a box, after `#` or found by a pattern, compared as strings or by math-verify."""

import re
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from ...config.data import GradingSection
from .extract import Place, boxed_place, hash_place, match_place
from .grader import Grader
from .normalise import as_fraction, is_words, normalise
from .pool import MathPool, Verdict

MAX_COMPARED = 300
"""Characters; longer answers are only compared as strings."""
CACHE_SIZE = 200_000
"""Verdicts kept; the oldest go first."""
UNDECIDED = {"error": "errors", "timeout": "timeouts", "crash": "crashes", "too_long": "too_long"}
"""How a comparison ends without a verdict, and what it is counted as."""


class TextGrader(Grader):
    """Grades as a `grading` section says. Comparison processes start with the first pair that needs one.

    `counts`: pairs that math-verify was `asked` about, of which it has `decided` some; the others count as different:
    `timeouts`, `crashes`, `errors` (math-verify itself raised) and `too_long`. What is remembered counts again.
    """

    def __init__(self, section: GradingSection, *, pool: MathPool | None = None) -> None:
        super().__init__()
        self._find = finder(section)
        self._label_mark = {"boxed": "\\boxed", "hash": "#", "regex": None}[section.extract]
        self._pool: MathPool | None = None
        if section.equivalence == "math":
            self._pool = pool or MathPool(timeout_s=section.timeout_s)
        self._verdicts: dict[tuple[str, str], Verdict | Literal["too_long"]] = {}
        self._lock = threading.Lock()

    def extract(self, text: str, *, finished: bool = True) -> str | None:
        """The last answer found, normalised; None where there is none or it is empty."""
        place = self._find(text, finished)
        return (normalise(text[place[0] : place[1]]) or None) if place is not None else None

    def locate(self, text: str, *, finished: bool = True) -> Place | None:
        """Where the last answer stands; None where `extract` finds none."""
        return self._find(text, finished) if self.extract(text, finished=finished) is not None else None

    def normalise(self, answer: str) -> str:
        """See `normalise.py`."""
        return normalise(answer)

    def label(self, text: str) -> str:
        r"""A true answer as the file has it: alone, or at the end of a solution (`... #### 42`, `... \boxed{42}`)."""
        if self._label_mark is not None and self._label_mark in text:
            return self.extract(text) or normalise(text)
        return normalise(text)

    def equivalent(self, a: str, b: str) -> bool:
        """Whether two answers are the same: by spelling, by value if both are plain numbers, else by math-verify."""
        a, b = sorted((normalise(a), normalise(b)))
        if a == b:
            return True
        if self._pool is None:
            return False
        plain = _plainly(a, b)
        return self._ask(a, b) if plain is None else plain

    def _ask(self, a: str, b: str) -> bool:
        """math-verify's verdict, remembered; no verdict counts as different."""
        assert self._pool is not None
        with self._lock:
            verdict = self._verdicts.get((a, b))
            known = verdict is not None
        if verdict is None:
            verdict = "too_long" if max(len(a), len(b)) > MAX_COMPARED else self._pool.compare(a, b)
        with self._lock:
            self.counts.update(("asked", UNDECIDED.get(verdict, "decided")))
            while not known and len(self._verdicts) >= CACHE_SIZE:
                self._verdicts.pop(next(iter(self._verdicts)))
            self._verdicts[a, b] = verdict
        return verdict == "equal"

    def counted(self) -> dict[str, float]:
        """See Grader."""
        if self._pool is None:
            return {}
        with self._lock:
            taken, self.counts = self.counts, Counter()
        return {f"grading/{name}": float(taken[name]) for name in ("asked", *UNDECIDED.values())}

    def classes_of(self, groups: Sequence[Sequence[str | None]]) -> list[list[int | None]]:
        """`classes` of each group; groups are compared side by side, one thread for each process."""
        if self._pool is None or self._pool.size == 1 or len(groups) < 2:
            return super().classes_of(groups)
        with ThreadPoolExecutor(self._pool.size) as threads:
            return list(threads.map(self.classes, groups))

    def close(self) -> None:
        """End the comparison processes."""
        if self._pool is not None:
            self._pool.close()


def _plainly(a: str, b: str) -> bool | None:
    """A verdict that needs no algebra; None where algebra must decide."""
    if is_words(a) or is_words(b):
        return a.casefold() == b.casefold()
    left, right = as_fraction(a), as_fraction(b)
    if left is None or right is None:
        return None
    if left == right:
        return True
    # Unequal decimals may still be one number rounded differently: math-verify compares six digits.
    return False if left.denominator == right.denominator == 1 else None


def finder(section: GradingSection) -> Callable[[str, bool], Place | None]:
    """How `section` finds an answer: (text, finished) -> where it stands, or None."""
    if section.extract == "boxed":
        return lambda text, finished: boxed_place(text)
    if section.extract == "hash":
        return lambda text, finished: hash_place(text, finished=finished)
    pattern = re.compile(str(section.pattern))  # the section has checked it
    return lambda text, finished: match_place(text, pattern, finished=finished)
