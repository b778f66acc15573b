"""Filling in what grading knows of sampled groups: each sample's answer, each group's classes."""

from collections.abc import Callable, Iterable

from ...types import Group, Prompt
from .grader import Grader


def annotate(groups: Iterable[Group], grader_of: Callable[[Prompt], Grader]) -> None:
    """Set `sample.answer` and `group.classes` of every group, with the grader of its prompt.

    Whether a response was cut off (`sample.finish`) is known here and handed to the extraction.
    """
    by_grader: dict[int, tuple[Grader, list[Group]]] = {}
    for group in groups:
        grader = grader_of(group.prompt)
        for sample in group.samples:
            sample.answer = grader.extract(sample.text, finished=sample.finish == "stop")
        by_grader.setdefault(id(grader), (grader, []))[1].append(group)
    for grader, members in by_grader.values():
        for group, classes in zip(members, grader.classes_of([group.answers for group in members]), strict=True):
            group.classes = classes
