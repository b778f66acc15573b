"""From a source in the config to prompts the policy can read: tokenised, counted, their labels put away."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from transformers import PreTrainedTokenizerBase

from ..config.data import DatasetSource, JsonlSource, TableSource, TaskSource
from ..types import Prompt
from .countdown_rows import CountdownFileGrader
from .errors import DataError
from .grading.grader import Grader
from .grading.text import TextGrader
from .jsonl import Row, read_rows
from .labels import LabelStore
from .tasks import Split, Task, TaskPrompt, get_task
from .tasks.base import Checker
from .tokenizer import without_end


@dataclass
class PromptSet:
    """The prompts of one source, in order."""

    name: str
    prompts: list[Prompt]
    grader: Grader
    dropped_overlong: int
    """Prompts left out for being longer than `max_prompt_tokens`."""
    unlabelled: int
    """Prompts that have no label."""
    fingerprint: str
    """SHA-256 of texts and labels, in order."""
    task: Task | None
    """The task that made the prompts, if one did."""
    checkers: Mapping[str, Checker] = field(default_factory=dict)
    """What the provider `checker` may use, by name."""

    def __len__(self) -> int:
        return len(self.prompts)


def load_source(
    source: TaskSource | JsonlSource | DatasetSource,
    *,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    labels: LabelStore,
    split: Split,
    seed: int,
    max_prompt_tokens: int,
    overlong: Literal["filter", "refuse"],
) -> PromptSet:
    """The prompts of `source`; their labels go to `labels` and nowhere else.

    `name` begins every prompt's id. `split` and `seed` matter to tasks alone, and count where the source has none of
    its own. DataError, in a sentence, for whatever makes the source unusable.
    """
    grader: Grader
    task: Task | None = None
    checkers: Mapping[str, Checker] = {}
    if isinstance(source, TaskSource):
        task = get_task(source.task, source.settings)
        grader, checkers = task.grader(), task.checkers()
        rows = _task_rows(task, source, name, split, seed)
    elif source.countdown is not None:
        grader = CountdownFileGrader(source.grading)
        checkers = grader.checkers()
        rows = read_rows(source, name=name, tokenizer=tokenizer, label_of=grader.normalise)
    else:
        grader = TextGrader(source.grading)
        rows = read_rows(source, name=name, tokenizer=tokenizer, label_of=grader.label)
    # A chat template writes the tokens that begin a text itself.
    special = not (isinstance(source, TableSource) and source.template == "chat")
    prompts, dropped = _tokenise(rows, tokenizer, special, max_prompt_tokens, overlong)
    if not prompts:
        raise DataError(
            f"no prompt of {name!r} is left: all {dropped} are longer than max_prompt_tokens = {max_prompt_tokens}; "
            "raise the limit or shorten the prompts"
        )
    if task is not None:
        _check_readable(name, task, prompts, tokenizer)
    kept = {prompt.id for prompt in prompts}
    for row in rows:
        if row.id in kept and row.label is not None:
            labels.add(row.id, row.label)
    return PromptSet(
        name=name,
        prompts=prompts,
        grader=grader,
        dropped_overlong=dropped,
        unlabelled=sum(row.label is None for row in rows if row.id in kept),
        fingerprint=_fingerprint(row for row in rows if row.id in kept),
        task=task,
        checkers=checkers,
    )


def _task_rows(task: Task, source: TaskSource, name: str, split: Split, seed: int) -> list[Row]:
    seed = seed if source.seed is None else source.seed
    made = task.prompts(source.size, seed=seed, split=source.split or split, skip=source.skip)
    return [
        Row(id=f"{name}/{source.skip + i}", text=prompt.text, label=prompt.label, fields=_with_paraphrase(task, prompt))
        for i, prompt in enumerate(made)
    ]


def _with_paraphrase(task: Task, prompt: TaskPrompt) -> dict[str, object]:
    other = task.paraphrase(prompt)
    return prompt.fields if other is None else {**prompt.fields, "paraphrase": other}


def _tokenise(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, special: bool, limit: int, overlong: str
) -> tuple[list[Prompt], int]:
    """Prompts of at most `limit` tokens, and how many were longer. `special`: add what the tokenizer begins with."""
    try:
        encoded = _encode(tokenizer, [row.text for row in rows], special)
        others = {row.id: str(row.fields["paraphrase"]) for row in rows if "paraphrase" in row.fields}
        paraphrases = dict(zip(others, _encode(tokenizer, list(others.values()), special), strict=True))
    except Exception as error:
        raise DataError(
            f"the model's tokenizer cannot encode the prompts ({error}): is model.path the right base for this data?"
        ) from error
    prompts = []
    for row, ids in zip(rows, encoded, strict=True):
        fields, longest = row.fields, len(ids)
        if (other := paraphrases.get(row.id)) is not None:
            fields, longest = {**fields, "paraphrase_tokens": other}, max(longest, len(other))
        if longest <= limit:
            prompts.append(Prompt(id=row.id, text=row.text, tokens=tuple(ids), fields=fields))
        elif overlong == "refuse":
            raise DataError(
                f"prompt {row.id!r} has {longest} tokens and data.max_prompt_tokens is {limit}: "
                "raise the limit, or set data.overlong to filter"
            )
    return prompts, len(rows) - len(prompts)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], special: bool) -> list[list[int]]:
    """Tokens of each text; some tokenizers end every text, and a prompt goes on."""
    if not texts:
        return []
    found: list[list[int]] = tokenizer(texts, add_special_tokens=special)["input_ids"]
    return [without_end(tokenizer, text, ids) for text, ids in zip(texts, found, strict=True)] if special else found


def _check_readable(name: str, task: Task, prompts: list[Prompt], tokenizer: PreTrainedTokenizerBase) -> None:
    """A tokenizer without the task's characters drops them in silence: compare what it reads with what was written."""
    read = str(tokenizer.decode(list(prompts[0].tokens), skip_special_tokens=True))
    if read.strip() != prompts[0].text.strip():
        raise DataError(
            f"the model's tokenizer reads {prompts[0].text!r}, a prompt of {name!r} (task {task.name}), as {read!r}: "
            f"use a base whose tokenizer has the task's characters, such as one pretrained on {task.name}"
        )


def _fingerprint(rows: Iterable[Row]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.text, row.label]).encode() + b"\n")
    return digest.hexdigest()
