"""The grader of one source: extraction, normalisation, equivalence, and classes of equivalent answers."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence

from ..errors import DataError
from .extract import Place


class Grader(ABC):
    """Reads answers and compares them. The base compares normalised strings; subclasses say how an answer is found.

    Equivalence is the same relation everywhere: votes, rewards, audit and evaluation. A vote's winner is a class from
    `classes`, never a second comparison.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        """What was counted since `counted` was last called."""

    @abstractmethod
    def extract(self, text: str, *, finished: bool = True) -> str | None:
        """The normalised answer in `text`, None if there is none. `finished`: the model ended the response itself."""

    def locate(self, text: str, *, finished: bool = True) -> Place | None:
        """Where in `text` the answer stands that `extract` reads; None exactly where that finds none.

        For rewards of a span. DataError from graders that cannot tell.
        """
        raise DataError(
            f"{type(self).__name__} cannot say where in a response the answer stands: give it a method `locate`, or "
            "choose a reward that looks at whole responses"
        )

    def normalise(self, answer: str) -> str:
        """The form in which answers are compared. Idempotent."""
        return answer.strip()

    def equivalent(self, a: str, b: str) -> bool:
        """Whether two extracted answers are the same. Symmetric."""
        return self.normalise(a) == self.normalise(b)

    def classes(self, answers: Sequence[str | None]) -> list[int | None]:
        """For each answer the index of the first one it is equivalent to; None where nothing was parsed.

        Each distinct string is compared once, with the first member of every class so far.
        """
        class_of: dict[str, int] = {}
        firsts: list[tuple[int, str]] = []
        for index, answer in enumerate(answers):
            if answer is None or answer in class_of:
                continue
            match = next((first for first, other in firsts if self.equivalent(other, answer)), None)
            if match is None:
                firsts.append((index, answer))
                match = index
            class_of[answer] = match
        return [None if answer is None else class_of[answer] for answer in answers]

    def classes_of(self, groups: Sequence[Sequence[str | None]]) -> list[list[int | None]]:
        """`classes` of each group of answers, in order."""
        return [self.classes(answers) for answers in groups]

    def correct(self, answer: str | None, label: str) -> bool:
        """Whether `answer` is the true one; never for a response without an answer."""
        return answer is not None and self.equivalent(answer, label)

    def counted(self) -> dict[str, float]:
        """What grading counted since the last call, the same whatever was graded before it: metrics under `grading/`.
        Nothing from graders that cannot fail."""
        return {}

    def close(self) -> None:  # noqa: B027 (most graders hold on to nothing)
        """Give back whatever grading holds on to (worker processes)."""
