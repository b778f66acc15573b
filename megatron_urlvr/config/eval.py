"""`eval`: held-out sets and how they are sampled."""

import re
from typing import Annotated

from pydantic import Discriminator, Field, Tag

from .base import Section, rule
from .data import DatasetSource, JsonlSource, TableSource, TaskSource, kind_of_source

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class EvalOptions(Section):
    samples: int = Field(default=4, ge=1)
    """Responses for each prompt (n of avg@n and maj@n)."""
    pass_k: list[int] = Field(default_factory=list)
    """Which pass@k to report; each k must be below `samples`."""
    maj_k: list[int] = Field(default_factory=list)
    """Which maj@k to report besides maj@samples, over subsets of the samples; each k at most half of `samples`."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the smallest set of tokens that holds this much probability; 1 is all of them."""
    greedy: bool = True
    """Also decode each prompt once at temperature 0."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """None: the rollout's."""
    base_votes: int = Field(default=16, ge=1)
    """Responses for each prompt at step 0, for the base's maj@n line; at least `samples` are drawn."""

    @rule("maj_k", "samples")
    def _maj_k(self) -> str | None:
        if bad := [k for k in self.maj_k if not (k >= 1 and 2 * k <= self.samples)]:
            return f"maj_k holds {bad}: subsets of k need samples = {self.samples} to be at least 2 k, and k at least 1"
        return None

    @rule("pass_k", "samples")
    def _pass_k(self) -> str | None:
        if bad := [k for k in self.pass_k if not 1 <= k < self.samples]:
            return f"pass_k holds {bad}: the unbiased estimate needs 1 <= k < samples = {self.samples}"
        return None


class TaskEvalSet(TaskSource, EvalOptions):
    """Held-out prompts of a task: never the training prompts, whatever the seeds, unless `split` says so."""


class _Labelled(TableSource, EvalOptions):
    """What held-out tables have in common."""

    @rule("label_field")
    def _labels(self) -> str | None:
        if self.label_field is None:
            return "label_field = null: an evaluation set needs labels; name the key that holds them"
        return None


class JsonlEvalSet(JsonlSource, _Labelled):
    """Held-out prompts from a file."""


class DatasetEvalSet(DatasetSource, _Labelled):
    """Held-out prompts from a data set."""


EvalSet = Annotated[
    Annotated[TaskEvalSet, Tag("task")]
    | Annotated[JsonlEvalSet, Tag("jsonl")]
    | Annotated[DatasetEvalSet, Tag("dataset")],
    Discriminator(kind_of_source),
]


class EvalSection(Section):
    every: int = Field(default=0, ge=0)
    """Evaluate each so many steps, at step 0 and at the end; 0 never."""
    sets: dict[str, EvalSet] = Field(default_factory=dict)
    """Held-out sets by name."""

    @rule("sets")
    def _not_the_training_set(self) -> str | None:
        # A prompt's id begins with the name of its set.
        return "sets.train: this name is the training prompts' own; choose another" if "train" in self.sets else None

    @rule("sets")
    def _names(self) -> str | None:
        if wrong := [name for name in self.sets if not _NAME.fullmatch(name)]:
            return (
                f"sets: {', '.join(map(repr, wrong))} cannot name a set: names begin files and metrics, so they hold"
                " letters, digits, '.', '_' and '-', and begin with a letter or digit"
            )
        return None

    @rule("every", "sets")
    def _something_to_evaluate(self) -> str | None:
        if self.every and not self.sets:
            return f"every = {self.every}, but there are no sets to evaluate: add one under sets, or set every to 0"
        return None
