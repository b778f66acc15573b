"""Rows of common benchmarks, as people have them on disk, are read and graded by configs/eval/benchmarks.yaml."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_urlvr.config.data import JsonlSource
from megatron_urlvr.data.grading.text import TextGrader
from megatron_urlvr.data.jsonl import read_rows

CONFIG = Path(__file__).parents[3] / "configs/eval/benchmarks.yaml"
ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    # set: a row of its shape, a right answer, a wrong one
    "aime24": ({"id": 60, "problem": "Q", "solution": "S", "answer": "204", "url": "u", "year": "2024"}, "204", "205"),
    "aime25": ({"problem": "Q", "answer": "70", "id": "0"}, "70", "7"),
    "amc23": ({"id": 0, "question": "Q", "answer": 27.0, "url": "u"}, "27", "2.7"),
    "math500": (
        {"problem": "Q", "solution": "S", "answer": "\\frac{\\pi}{2}", "subject": "A", "level": 2, "unique_id": "x/1"},
        "\\dfrac{\\pi}{2}",
        "\\pi",
    ),
}


class ChatTokenizer:
    """A template that shows what it was given."""

    chat_template = "there is one"

    def apply_chat_template(self, messages: list[dict[str, str]], **_: object) -> str:
        return "|".join(f"{message['role']}: {message['content']}" for message in messages)


@pytest.mark.parametrize("name", ROWS)
def test_a_benchmarks_rows_are_read_and_graded(name: str, tmp_path: Path):
    row, right, wrong = ROWS[name]
    spec = yaml.safe_load(CONFIG.read_text())["eval"]["sets"][name]
    fields = {key: value for key, value in spec.items() if key in JsonlSource.model_fields}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    source = JsonlSource(**{**fields, "path": str(path)})
    grader = TextGrader(source.grading)
    try:
        (read,) = read_rows(source, name=name, tokenizer=ChatTokenizer(), label_of=grader.label)  # type: ignore[arg-type]
        assert read.text.endswith("user: Q")
        assert read.label is not None
        assert grader.correct(grader.extract(f"So it is \\boxed{{{right}}}."), read.label)
        assert not grader.correct(grader.extract(f"So it is \\boxed{{{wrong}}}."), read.label)
        assert set(read.fields) == {"question"}  # a solution never travels with its prompt
    finally:
        grader.close()
