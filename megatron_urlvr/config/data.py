"""`data`: where prompts and labels come from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag, ValidationInfo, field_validator

from .base import Section, UnknownName, rule


class TaskChoice(Section):
    """A task that generates itself (`chain_sum`, `countdown`, or one from an entry point) and its settings."""

    task: str
    """Name of a registered task."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """The task's own settings, see `urlvr config show --docs`; its defaults are filled in."""

    @field_validator("task")
    @classmethod
    def _known(cls, value: str) -> str:
        _task(value)
        return value

    @field_validator("settings")
    @classmethod
    def _settings_hold(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if "task" not in info.data:
            return value
        settings: dict[str, Any] = _task(info.data["task"]).Settings.model_validate(value).model_dump(mode="json")
        return settings

    @classmethod
    def surviving(cls, parent: Mapping[str, Any], child: Mapping[str, Any]) -> dict[str, Any]:
        """Another task starts from its own settings."""
        if child.get("task", parent.get("task")) == parent.get("task"):
            return dict(parent)
        return {key: value for key, value in parent.items() if key != "settings"}

    @classmethod
    def open_model(cls, field: str | None, raw: Mapping[str, Any]) -> type[BaseModel] | None:
        try:
            model: type[BaseModel] | None = _task(raw.get("task")).Settings if field == "settings" else None
        except ValueError:
            return None
        return model


def _task(name: Any) -> Any:
    """The task class, imported late: tasks depend on this package. UnknownName if there is none."""
    from megatron_urlvr.data.tasks import registry

    if name not in registry.available():
        raise UnknownName("task", str(name), registry.available())
    return registry.task_class(name)


class TaskSource(TaskChoice):
    """Prompts from a task that generates itself."""

    size: int = Field(ge=1)
    """Number of distinct prompts."""
    seed: int | None = None
    """Seed of the prompts. None: the run's seed for training data, 0 for evaluation sets."""
    skip: int = Field(default=0, ge=0)
    """Leave out the first prompts of the sequence, so that two sets of one seed are disjoint."""
    split: Literal["train", "held_out"] | None = None
    """Side of the task's prompts. None: `train` to train on, `held_out` to evaluate. Training on `held_out` with the
    seed and place of an evaluation set trains on its very prompts (test-time training)."""

    @classmethod
    def surviving(cls, parent: Mapping[str, Any], child: Mapping[str, Any]) -> dict[str, Any]:
        return super().surviving(_surviving_kind(parent, child), child)


class GradingSection(Section):
    """How an answer is read from a response and compared."""

    extract: Literal["boxed", "hash", "regex"] = "boxed"
    r"""`boxed`: the last `\boxed{...}`; `hash`: the last `#...` before the end; `regex`: last match of `pattern`."""
    pattern: str | None = None
    """Regular expression with one group; required by `extract: regex`."""
    equivalence: Literal["exact", "math"] = "math"
    """`exact`: normalised strings; `math`: math-verify, after the strings differ."""
    timeout_s: float = Field(default=5.0, gt=0)
    """Time limit of one math-verify comparison."""

    @rule("extract", "pattern")
    def _pattern(self) -> str | None:
        if self.extract != "regex":
            return None if self.pattern is None else f"pattern is read under extract: regex alone, not {self.extract}"
        if self.pattern is None:
            return "extract: regex needs pattern, a regular expression with one group"
        try:
            groups = re.compile(self.pattern).groups
        except re.error as error:
            return f"pattern = {self.pattern!r} is no regular expression: {error}"
        return (
            None
            if groups == 1
            else f"pattern = {self.pattern!r} has {groups} groups; exactly one, the answer, is needed"
        )


class CountdownColumns(Section):
    """Countdown problems as the public data sets have them: a target and numbers, without a solution."""

    numbers_field: str = "nums"
    """Key of the list of numbers."""
    target_field: str = "target"
    """Key of the target."""
    question: str = (
        "Combine the numbers {numbers} with + - * / and parentheses so that the result is {target}. "
        "Use every number exactly once."
    )
    """What is asked. `{numbers}` and `{target}` are replaced."""
    separator: str = ", "
    """Between the numbers of a question."""

    @field_validator("question")
    @classmethod
    def _has_slots(cls, value: str) -> str:
        if absent := [slot for slot in ("{numbers}", "{target}") if slot not in value]:
            raise ValueError(f"must contain the placeholder {' and '.join(absent)}")
        return value


class TableSource(Section):
    """What every table of prompts has, whatever holds it."""

    prompt_field: str = "prompt"
    """Key of the question."""
    label_field: str | None = "answer"
    """Key of the true answer, read by audit and evaluation alone. None: there are no labels."""
    id_field: str | None = None
    """Key of a unique id. None: the line number."""
    paraphrase_field: str | None = None
    """Key of the same question in other words, for the provider `votes`."""
    tests_field: str | None = None
    """Key of Python text that tests a program, for the provider `unit_tests`."""
    template: Literal["plain", "chat"] = "plain"
    """`chat` applies the tokenizer's chat template to one user message; `plain` formats `plain_template`."""
    plain_template: str = "{prompt}"
    """Text around the prompt under `template: plain`."""
    system: str | None = None
    """System message under `template: chat`."""
    countdown: CountdownColumns | None = None
    """The rows are Countdown problems: question and truth come from two columns instead of `prompt_field` and
    `label_field`, and answers are compared as expressions, whatever `grading.equivalence` says."""
    grading: GradingSection = GradingSection()
    """How answers are read and compared."""
    limit: int | None = Field(default=None, ge=1)
    """Use the first `limit` rows."""

    @field_validator("plain_template")
    @classmethod
    def _has_slot(cls, value: str) -> str:
        if "{prompt}" not in value:
            raise ValueError("must contain the placeholder {prompt}")
        return value

    @classmethod
    def surviving(cls, parent: Mapping[str, Any], child: Mapping[str, Any]) -> dict[str, Any]:
        return _surviving_kind(parent, child)


class JsonlSource(TableSource):
    """Prompts from a JSON-lines or Parquet file."""

    path: str
    """File with one JSON object a line; or a Parquet file, by its ending `.parquet`."""


class DatasetSource(TableSource):
    """Prompts from a data set of the `datasets` library."""

    dataset: str
    """Folder that `save_to_disk` wrote, or a name on the Hugging Face hub."""
    split: str = "train"
    """Which of its splits."""
    subset: str | None = None
    """Configuration of a data set on the hub that has several."""
    revision: str | None = None
    """Commit of a data set on the hub. None: the newest, which may be another one tomorrow."""


def kind_of_source(value: Any) -> str:
    """Tag of a source as written: `jsonl` when it has a path, `dataset` when it names one, else `task`."""
    keys = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    return "jsonl" if "path" in keys else "dataset" if "dataset" in keys else "task"


_OWN = ("task", "path", "dataset")
"""The key that tells each kind of source from the others."""


def _surviving_kind(parent: Mapping[str, Any], child: Mapping[str, Any]) -> dict[str, Any]:
    """When a source of one kind takes the place of one of another, only what all know stays (an evaluation set's
    sampling), and between tables how they are read."""
    before, after = ([key for key in _OWN if key in each] for each in (parent, child))
    if not before or not after or before == after:
        return dict(parent)
    gone = {*TaskSource.model_fields, *JsonlSource.model_fields, *DatasetSource.model_fields}
    if "task" not in (*before, *after):
        gone -= set(TableSource.model_fields)
    return {key: value for key, value in parent.items() if key not in gone}


Source = Annotated[
    Annotated[TaskSource, Tag("task")]
    | Annotated[JsonlSource, Tag("jsonl")]
    | Annotated[DatasetSource, Tag("dataset")],
    Discriminator(kind_of_source),
]
"""A task (`{task: chain_sum, size: 8192}`), a file (`{path: train.jsonl}`) or a data set (`{dataset: folder}`)."""


class DataSection(Section):
    train: Source
    """Prompts to train on."""
    shuffle: bool = True
    """A new order each epoch, from the seed; otherwise the file's order."""
    max_prompt_tokens: int = Field(default=1024, ge=1)
    """Longest prompt, in tokens."""
    overlong: Literal["filter", "refuse"] = "refuse"
    """What happens to longer prompts: dropped and counted, or an error."""
