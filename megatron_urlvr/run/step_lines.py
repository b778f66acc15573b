"""JSON-lines files of a run folder, each row with its `step`: how they are read, cut back and added to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..exit_codes import UnusableInput
from .folder import write_bytes


class StepLines:
    """One such file; it need not be there. A last line torn by a crash counts as not written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> list[dict[str, Any]]:
        """All whole rows, in file order. UnusableInput for a file that is damaged before its last line."""
        return [row for _, row in self._lines()]

    def truncate(self, step: int) -> int:
        """Drop the rows after `step`, which a resumed run will write again, and a torn last line. What stays keeps its
        bytes. Returns the number of rows dropped."""
        lines = self._lines()
        kept = [line for line, row in lines if row["step"] <= step]
        if self.path.exists():
            content = b"".join(kept)
            if content != self.path.read_bytes():
                write_bytes(self.path, content)
        return len(lines) - len(kept)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one row."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _lines(self) -> list[tuple[bytes, dict[str, Any]]]:
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().splitlines(keepends=True)
        out = []
        for number, line in enumerate(lines, 1):
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("no end of line")
                row = json.loads(line)
                row["step"]
            except (ValueError, KeyError, TypeError) as error:
                if number == len(lines):
                    break
                raise UnusableInput(
                    f"{self.path}, line {number} is no row with a step ({error}): the file was edited or damaged. "
                    "Remove the line, or move the file away."
                ) from error
            out.append((line, row))
        return out
