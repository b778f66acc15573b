"""JSON-lines files with a step in each row, as crashes leave them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_urlvr.exit_codes import UnusableInput
from megatron_urlvr.run.step_lines import StepLines


@pytest.fixture
def lines(tmp_path: Path) -> StepLines:
    return StepLines(tmp_path / "sub" / "metrics.jsonl")


def write(lines: StepLines, text: str) -> None:
    lines.path.parent.mkdir(exist_ok=True)
    lines.path.write_text(text)


def test_rows_that_are_added_are_read_back(lines):
    assert lines.rows() == []
    lines.append({"step": 0, "a": 1.5})
    lines.append({"step": 5})
    assert lines.rows() == [{"step": 0, "a": 1.5}, {"step": 5}]


def test_a_torn_last_line_counts_as_not_written(lines):
    write(lines, '{"step": 0, "a": 1.0}\n{"step": 1}\n{"step": 2, "a"')
    assert lines.rows() == [{"step": 0, "a": 1.0}, {"step": 1}]


def test_a_last_line_without_its_end_is_torn_even_when_it_parses(lines):
    write(lines, '{"step": 1}\n{"step": 12}')  # may have been {"step": 12, ...} or {"step": 120}
    assert lines.rows() == [{"step": 1}]


def test_damage_in_the_middle_is_refused(lines):
    write(lines, '{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(UnusableInput, match="line 2 is no row with a step"):
        lines.rows()


def test_truncating_keeps_the_bytes_of_earlier_rows_and_drops_later_and_torn_ones(lines):
    kept = '{"step": 0, "a":1.10}\n{"step": 2,  "b": 1e-7}\n'
    write(lines, kept + '{"step": 3}\n{"step": 4}\n{"ste')
    assert lines.truncate(2) == 2
    assert lines.path.read_text() == kept
    assert lines.truncate(2) == 0
    assert lines.path.read_text() == kept


def test_truncating_a_file_that_is_not_there_does_nothing(lines):
    assert lines.truncate(5) == 0
    assert not lines.path.exists()
