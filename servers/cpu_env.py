"""Make the environment in which SGLang runs on a CPU, and print the path of its Python.

It lies in the user's cache folder under the hash of its requirements, so that every checkout with the same
requirements shares it; a lock keeps two builds apart, and a build that was cut off is started over. Standard library
only: `make sglang-cpu` runs it with any Python of the right version.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "requirements-cpu.txt"
WITHOUT_DEPENDENCIES = HERE / "requirements-cpu-nodeps.txt"
STUBS = HERE.parent / "tests" / "sglang" / "stubs"
"""What SGLang imports on a CPU of two packages that exist for CUDA alone."""
COMPLETE = ".complete"


def fingerprint() -> str:
    """Twelve hexadecimal digits of the requirements, the stubs and the Python version they are installed for."""
    digest = hashlib.sha256(f"{sys.version_info[:2]}".encode())
    for file in (REQUIREMENTS, WITHOUT_DEPENDENCIES):
        lines = (line.split("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
        digest.update("\n".join(line for line in lines if line).encode())
    for file in sorted(STUBS.rglob("*.py")):
        digest.update(file.relative_to(STUBS).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def cache_folder() -> Path:
    """Where environments are kept: `$URLVR_CACHE`, else `$XDG_CACHE_HOME/megatron_urlvr`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("URLVR_CACHE") or Path(base) / "megatron_urlvr")


def python_of(folder: Path) -> Path:
    """The environment's interpreter."""
    return folder / "bin" / "python"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold `path` for this process; the system lets go of it when the process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print(f"another process builds this environment; waiting for {path}", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def ensure() -> Path:
    """The interpreter of a complete environment, built when there is none. CalledProcessError when pip fails."""
    folder = cache_folder() / f"sglang-cpu-{fingerprint()}"
    with locked(folder.with_suffix(".lock")):
        if not (folder / COMPLETE).exists():
            build(folder)
    return python_of(folder)


def build(folder: Path) -> None:
    """Install everything into a new `folder`; it counts as complete only at the very end."""
    print(f"building {folder} (some minutes)", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    pip = [str(python_of(folder)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # pip's output goes to stderr: stdout is the path alone.
    subprocess.run([*pip, "-r", str(REQUIREMENTS)], check=True, stdout=sys.stderr)
    subprocess.run([*pip, "--no-deps", "-r", str(WITHOUT_DEPENDENCIES)], check=True, stdout=sys.stderr)
    libraries = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    shutil.copytree(STUBS, libraries, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / COMPLETE).touch()


if __name__ == "__main__":
    print(ensure())
