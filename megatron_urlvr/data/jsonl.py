"""Questions from a table (JSON lines, Parquet, a data set), through a template, every unusable row named."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..config.data import DatasetSource, JsonlSource, TableSource
from .columns import dataset_records, parquet_records
from .countdown_rows import label_of as countdown_label
from .countdown_rows import question_of, read_problem
from .errors import DataError
from .tokenizer import NO_CHAT_TEMPLATE, chat_text

SHOWN = 5
"""Unusable rows that one error lists."""


@dataclass(frozen=True)
class Row:
    """One question before tokenisation."""

    id: str
    text: str
    """What the policy reads, template applied."""
    label: str | None
    fields: dict[str, object]


def read_rows(
    source: JsonlSource | DatasetSource,
    *,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    label_of: Callable[[str], str],
) -> list[Row]:
    """The rows of `source`, at most `source.limit`. Blank lines are passed over.

    `label_of` turns a label as written into the form it is compared in. A prompt's fields hold the bare `question`,
    and of Countdown numbers and target: other columns may give the answer away. DataError names every cause with its
    line.
    """
    rows: list[Row] = []
    wrong: list[str] = []
    seen: dict[str, int] = {}
    keys: set[str] = set()
    render = _renderer(source, tokenizer)
    what = source.path if isinstance(source, JsonlSource) else source.dataset
    for number, line in _numbered(source):
        if source.limit is not None and len(rows) + len(wrong) == source.limit:
            break
        try:
            record = _record(line) if isinstance(line, str) else line
            keys |= record.keys()
            row = _row(record, number, source, name, render, label_of)
            first = seen.setdefault(row.id, number)
            if first != number:
                raise _RowError(f"has the id {row.id.removeprefix(name + '/')!r} of line {first}")
            rows.append(row)
        except _RowError as error:
            wrong.append(f"line {number} {error}")
    if wrong:
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise DataError(f"{what!r} has {len(wrong)} unusable rows: {'; '.join(wrong[:SHOWN])}{more}")
    if not rows:
        raise DataError(f"{what!r} has no rows: one question a row is expected")
    if source.countdown is None and source.label_field is not None and source.label_field not in keys:
        raise DataError(
            f"no row of {what!r} has the label_field {source.label_field!r} (keys: {', '.join(sorted(keys))}): "
            "name the right one, or set label_field to null for data without labels"
        )
    return rows


class _RowError(ValueError):
    """What is wrong with one row; completes "line 3 ..."."""


def _numbered(source: JsonlSource | DatasetSource) -> Iterator[tuple[int, str | dict[str, object]]]:
    """Rows with their numbers from 1: lines of JSON, or records."""
    if isinstance(source, DatasetSource):
        yield from enumerate(dataset_records(source), start=1)
    elif source.path.endswith(".parquet"):
        yield from enumerate(parquet_records(source.path, source.limit), start=1)
    else:
        yield from _lines(source.path)


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers from 1."""
    file = Path(path).expanduser()
    if not file.exists():
        raise DataError(f"the data file {path!r} does not exist (looked in {Path.cwd()})")
    if not file.is_file():
        raise DataError(f"{path!r} is not a file: name one JSON-lines file")
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, line
    except UnicodeDecodeError as error:
        raise DataError(f"{path!r} is not UTF-8 text ({error}): is it compressed, or another format?") from error
    except OSError as error:
        raise DataError(f"{path!r} cannot be read: {error}") from error


def _record(line: str) -> dict[str, object]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _RowError(f"is not valid JSON ({error})") from error
    if not isinstance(record, dict):
        raise _RowError(f"is a {type(record).__name__}; an object is expected")
    return record


def _row(
    record: dict[str, object],
    number: int,
    source: TableSource,
    name: str,
    render: Callable[[str], str],
    label_of: Callable[[str], str],
) -> Row:
    label: str | None
    if source.countdown is None:
        question, known = _question(record, source), {}
        label = _label(record, source, label_of)
    else:
        try:
            numbers, target = read_problem(record, source.countdown)
        except ValueError as error:
            raise _RowError(str(error)) from error
        question, known = question_of(numbers, target, source.countdown), {"numbers": numbers, "target": target}
        label = countdown_label(numbers, target)
    identity: object = number
    if source.id_field is not None:
        identity = record.get(source.id_field)
        if isinstance(identity, bool) or not isinstance(identity, str | int) or identity == "":
            raise _RowError(f"has no id (key {source.id_field!r}): a string or an integer is expected")
    return Row(
        id=f"{name}/{identity}",
        text=render(question),
        label=label,
        fields={"question": question, **known, **_extras(record, source, render)},
    )


def _question(record: dict[str, object], source: TableSource) -> str:
    """The bare question of a row."""
    question = record.get(source.prompt_field)
    if question is None:
        raise _RowError(f"has no prompt (key {source.prompt_field!r}; it has {', '.join(sorted(record)) or 'no keys'})")
    if not isinstance(question, str):
        raise _RowError(f"has a {type(question).__name__} under {source.prompt_field!r}; a string is expected")
    if not question.strip():
        raise _RowError(f"has an empty prompt (key {source.prompt_field!r})")
    return question


def _extras(record: dict[str, object], source: TableSource, render: Callable[[str], str]) -> dict[str, object]:
    """What providers may know of a row besides the question: its paraphrase and its tests, where it has them."""
    extras: dict[str, object] = {}
    for key, column in (("paraphrase", source.paraphrase_field), ("tests", source.tests_field)):
        value = None if column is None else record.get(column)
        if value is None:
            continue
        if not isinstance(value, str):
            raise _RowError(f"has a {type(value).__name__} under {column!r}; a string is expected")
        if value.strip():
            extras[key] = render(value) if key == "paraphrase" else value
    return extras


def _label(record: dict[str, object], source: TableSource, label_of: Callable[[str], str]) -> str | None:
    """The true answer of a row: a string or number; None where the row has none."""
    raw = None if source.label_field is None else record.get(source.label_field)
    if raw is None:
        return None
    if isinstance(raw, bool) or not isinstance(raw, str | int | float):
        raise _RowError(f"has a {type(raw).__name__} under {source.label_field!r}; a string or a number is expected")
    label = label_of(str(raw))
    if not label:
        raise _RowError(f"has an empty label (key {source.label_field!r})")
    return label


def _renderer(source: TableSource, tokenizer: PreTrainedTokenizerBase) -> Callable[[str], str]:
    """From a bare question to what the policy reads."""
    if source.template == "plain":
        if source.system is not None:
            raise DataError(f"system = {source.system!r} needs template: chat; put it into plain_template instead")
        return lambda question: source.plain_template.replace("{prompt}", question)
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(NO_CHAT_TEMPLATE)
    return lambda question: chat_text(tokenizer, question, source.system)
