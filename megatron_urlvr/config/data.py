"""`data`: where prompts and labels come from."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from .base import Section


class TaskSource(Section):
    """Prompts from a task that generates itself (`chain_sum`, `countdown`, or one from an entry point)."""

    task: str
    """Name of a registered task."""
    size: int = Field(ge=1)
    """Number of distinct prompts."""
    seed: int | None = None
    """Seed of the prompts. None: the run's seed for training data, 0 for evaluation sets."""
    skip: int = Field(default=0, ge=0)
    """Leave out the first prompts of the sequence, so that two sets of one seed are disjoint."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """The task's own settings, see `urlvr config show --docs`."""


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


class JsonlSource(Section):
    """Prompts from a JSON-lines file."""

    path: str
    """File with one JSON object a line."""
    prompt_field: str = "prompt"
    """Key of the question."""
    label_field: str | None = "answer"
    """Key of the true answer, read by audit and evaluation alone. None: there are no labels."""
    id_field: str | None = None
    """Key of a unique id. None: the line number."""
    template: Literal["plain", "chat"] = "plain"
    """`chat` applies the tokenizer's chat template to one user message; `plain` formats `plain_template`."""
    plain_template: str = "{prompt}"
    """Text around the prompt under `template: plain`."""
    system: str | None = None
    """System message under `template: chat`."""
    grading: GradingSection = GradingSection()
    limit: int | None = Field(default=None, ge=1)
    """Use the first `limit` rows."""

    @field_validator("plain_template")
    @classmethod
    def _has_slot(cls, value: str) -> str:
        if "{prompt}" not in value:
            raise ValueError("must contain the placeholder {prompt}")
        return value


def kind_of_source(value: Any) -> str:
    """Tag of a source as written: `jsonl` when it has a path, else `task`."""
    keys = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    return "jsonl" if "path" in keys else "task"


Source = Annotated[
    Annotated[TaskSource, Tag("task")] | Annotated[JsonlSource, Tag("jsonl")],
    Discriminator(kind_of_source),
]
"""A task (`{task: chain_sum, size: 8192}`) or a file (`{path: train.jsonl}`)."""


class DataSection(Section):
    train: Source
    """Prompts to train on."""
    shuffle: bool = True
    """A new order each epoch, from the seed; otherwise the file's order."""
    max_prompt_tokens: int = Field(default=1024, ge=1)
    """Longest prompt, in tokens."""
    overlong: Literal["filter", "refuse"] = "refuse"
    """What happens to longer prompts: dropped and counted, or an error."""
