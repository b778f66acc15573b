"""What a task is: prompts, demonstrations to pretrain on, a tokenizer, a grader and an exact checker."""

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import ValidationError
from transformers import PreTrainedTokenizerFast

from ...config.base import Section
from ...types import Prompt
from ..errors import DataError
from ..grading.grader import Grader

Split = Literal["train", "held_out"]
HELD_OUT_EIGHTHS = 1
"""Eighths of all prompts that belong to the held-out side."""


@dataclass(frozen=True)
class TaskPrompt:
    """A generated question."""

    text: str
    label: str | None
    """The true answer, on its way to the `LabelStore`."""
    fields: dict[str, object] = field(default_factory=dict)
    """What a checker may know; never the label."""


def split_of(text: str) -> Split:
    """The side of `text`: decided by its hash, so that training and held-out prompts never meet, whatever the seeds."""
    return "held_out" if hash64("split", text) % 8 < HELD_OUT_EIGHTHS else "train"


def hash64(purpose: str, text: str) -> int:
    """A 64-bit hash of `text`, the same on every machine, independent between purposes."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, person=purpose.encode()).digest(), "big")


Checker = Callable[[Prompt, str], "bool | None"]
"""Whether a response holds, from prompt and response alone; None where it has no answer."""


class Task(ABC):
    """A task that generates itself. Registered under the entry-point group `megatron_urlvr.task`."""

    name: ClassVar[str]
    Settings: ClassVar[type[Section]]
    """Model of the task's settings."""

    def __init__(self, settings: dict[str, Any] | None = None) -> None:
        try:
            self.settings: Any = self.Settings.model_validate(settings or {})
        except ValidationError as error:
            known = ", ".join(self.Settings.model_fields)
            wrong = "; ".join(map(_sentence, error.errors()))
            raise DataError(f"settings of task {self.name!r} are wrong: {wrong} (known: {known})") from error

    @property
    @abstractmethod
    def max_response_tokens(self) -> int:
        """Length that lets the task's own demonstrations end, padding text aside: the usual `max_new_tokens`."""

    @abstractmethod
    def draw(self, seed: int) -> Iterator[TaskPrompt]:
        """Distinct prompts in an order that `seed` decides, of both splits. Ends when there are no more."""

    @abstractmethod
    def demonstration(self, prompt: TaskPrompt, rng: random.Random) -> str:
        """One response to pretrain on, drawn from the task's mixture of styles; ends with the end-of-sequence text."""

    def example(self, prompt: TaskPrompt, rng: random.Random) -> tuple[str, str]:
        """What a small base is pretrained on: a text to read and the one to write after it. A demonstration, unless the
        task teaches something else besides, such as to judge."""
        return prompt.text, self.demonstration(prompt, rng)

    def judge_text(self, prompt: Prompt | TaskPrompt, response: str) -> str | None:
        """What a base pretrained on this task reads when it is to judge a response; None where none is taught to."""
        return None

    def verdict(self, text: str) -> bool | None:
        """What it then writes: whether the response is right. None for anything else."""
        return None

    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The task's own character tokenizer."""

    @abstractmethod
    def grader(self) -> Grader:
        """Reads and compares this task's answers."""

    @abstractmethod
    def check(self, prompt: Prompt | TaskPrompt, response: str) -> bool | None:
        """Whether the answer of `response` is right, computed from the prompt alone; None where it has no answer."""

    def checkers(self) -> Mapping[str, Checker]:
        """What the provider `checker` may use, by name: `answer`, the exact checker, and what a task has of partial
        ones."""
        return {"answer": self.check}

    def paraphrase(self, prompt: TaskPrompt) -> str | None:
        """The same question in other words, with the same answer; None where the task knows none."""
        return None

    def prompts(self, size: int, *, seed: int, split: Split, skip: int = 0) -> list[TaskPrompt]:
        """`size` distinct prompts of `split`, after the first `skip` of the sequence that `seed` decides.

        Sequences are nested: a longer one begins with the shorter. DataError if there are not that many.
        """
        found: list[TaskPrompt] = []
        passed = 0
        for prompt in self.draw(seed):
            if split_of(prompt.text) != split:
                continue
            passed += 1
            if passed > skip:
                found.append(prompt)
                if len(found) == size:
                    return found
        raise DataError(
            f"task {self.name!r} has {passed} distinct {split} prompts with these settings, and size = {size} after "
            f"skip = {skip} were asked for: lower size or skip, or widen the task"
        )


def _sentence(problem: Any) -> str:
    """One of pydantic's errors as `key = value: what is wrong`; a broken rule speaks for itself."""
    if problem["type"] == "value_error":
        return str(problem["msg"]).removeprefix("Value error, ")
    return f"{'.'.join(map(str, problem['loc'])) or 'settings'} = {problem['input']!r}: {problem['msg']}"
