"""`make gpu`, a part of `make test`: the tests of GPUs run where the driver lists one; elsewhere it says that they do
not."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def stand_in(folder: Path, name: str, says: str) -> None:
    """A program in `folder` that prints one line."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f'#!/bin/sh\necho "{says}"\n')
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("driver", "line"),
    [("GPU 0: a stand-in", "ran tests/gpu"), ("No devices were found", "GPU tests: skipped, nvidia-smi lists no GPU.")],
)
def test_the_gpu_tests_run_where_there_is_a_gpu_and_say_so_where_not(driver: str, line: str, tmp_path: Path):
    stand_in(tmp_path / "path", "nvidia-smi", driver)
    stand_in(tmp_path / "venv" / "bin", "pytest", "ran $*")
    stand_in(tmp_path / "venv" / "bin", "python", "")
    (tmp_path / "venv" / ".installed").touch()
    done = subprocess.run(
        ["make", "--no-print-directory", "gpu", f"VENV={tmp_path / 'venv'}"],
        cwd=ROOT,
        env={**os.environ, "MAKEFLAGS": "", "PATH": f"{tmp_path / 'path'}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[0] == line
