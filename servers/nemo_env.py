"""Make the environment that NeMo-Run is tested in, and print the path of its Python.

It holds what the `[nemo]` extra of pyproject.toml asks for and what the launch commands import, without torch: jobs run
in the trainer's own environment. Kept like the one of `cpu_env.py`: cached outside the tree, by the hash of its
requirements, locked. Standard library only.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

from cpu_env import COMPLETE, cache_folder, locked, python_of

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
ALSO = ("typer", "jinja2", "pydantic", "omegaconf")
"""What `urlvr launch` itself imports."""


def requirements() -> list[str]:
    """The `[nemo]` extra, and of the project's dependencies those that launching needs."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    light = [line for line in project["dependencies"] if line.startswith(ALSO)]
    return [*project["optional-dependencies"]["nemo"], *light]


def ensure() -> Path:
    """The interpreter of a complete environment, built when there is none. CalledProcessError when pip fails."""
    wanted = requirements()
    name = hashlib.sha256("\n".join([str(sys.version_info[:2]), *wanted]).encode()).hexdigest()[:12]
    folder = cache_folder() / f"nemo-{name}"
    with locked(folder.with_suffix(".lock")):
        if not (folder / COMPLETE).exists():
            print(f"building {folder} (some minutes)", file=sys.stderr, flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            venv.create(folder, with_pip=True)
            pip = [str(python_of(folder)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, *wanted], check=True, stdout=sys.stderr)
            (folder / COMPLETE).touch()
    return python_of(folder)


if __name__ == "__main__":
    print(ensure())
