"""Make the environment in which SGLang runs on a CPU, and print the path of its Python.

It lies in the user's cache folder under the hash of its requirements, so that every checkout with the same
requirements shares it; a lock keeps two builds apart, and a build that was cut off is started over. Standard library
only: `make sglang-cpu` runs it with any Python of the right version. What each stage took goes to stderr.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "requirements-cpu.txt"
STUBS = HERE.parent / "tests" / "sglang" / "stubs"
"""What SGLang imports on a CPU of two packages that exist for CUDA alone."""
COMPLETE = ".complete"
CPU_TORCH = "https://download.pytorch.org/whl/cpu"
"""Where torch's CPU builds are, when no index of the user's has them: PyPI has the CUDA build."""
FIRST_IMPORT = "import sglang.srt.entrypoints.http_server, sglang.srt.managers.scheduler, sglang.srt.models.registry"


def fingerprint() -> str:
    """Twelve hexadecimal digits of the requirements, the stubs and the Python version they are installed for."""
    digest = hashlib.sha256(f"{sys.version_info[:2]}".encode())
    lines = (line.split("#")[0].strip() for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines())
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


@contextmanager
def timed(stage: str) -> Iterator[None]:
    """Say what `stage` took."""
    started = time.monotonic()
    yield
    print(f"[sglang-cpu, {stage}: {time.monotonic() - started:.0f} s]", file=sys.stderr, flush=True)


def ensure() -> Path:
    """The interpreter of a complete environment, built when there is none. CalledProcessError when that fails."""
    folder = cache_folder() / f"sglang-cpu-{fingerprint()}"
    with locked(folder.with_suffix(".lock")):
        if not (folder / COMPLETE).exists():
            build(folder)
    return python_of(folder)


def build(folder: Path) -> None:
    """Install everything into a new `folder`; it counts as complete only at the very end."""
    print(f"building {folder} (a few minutes)", file=sys.stderr, flush=True)
    with timed("in all"):
        shutil.rmtree(folder, ignore_errors=True)
        with timed("venv and uv"):
            venv.create(folder, with_pip=True)
            pip = [str(python_of(folder)), "-m", "pip", "--disable-pip-version-check"]
            run([*pip, "install", "--quiet", "uv"])
        with timed("packages"):
            install(folder, index_options(pip))
        with timed("first import"):
            first_import(folder)
        (folder / COMPLETE).touch()


def install(folder: Path, options: list[str]) -> None:
    """All pinned packages, downloaded side by side and not resolved; then the stubs."""
    command = [str(folder / "bin" / "uv"), "pip", "install", "--quiet", "--python", str(python_of(folder))]
    # On the same file system the cache is linked into the environment and costs nothing.
    command += ["--cache-dir", str(folder / "uv"), "--no-deps", "-r", str(REQUIREMENTS)]
    command += ["--index-strategy", "unsafe-best-match", *options]  # pip, too, looks through all indexes
    try:
        run(command)
    except subprocess.CalledProcessError:
        run([*command, "--extra-index-url", CPU_TORCH])
    shutil.rmtree(folder / "uv", ignore_errors=True)
    libraries = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    shutil.copytree(STUBS, libraries, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))


def index_options(pip: list[str]) -> list[str]:
    """The indexes that pip is configured with, for uv, which does not read pip's files; a certificate file goes into
    this process's environment."""
    said = subprocess.run([*pip, "config", "list"], check=True, capture_output=True, text=True).stdout
    if cert := re.search(r"^\S*\.cert='(.*)'$", said, flags=re.MULTILINE):
        os.environ.setdefault("SSL_CERT_FILE", cert[1])
    names = {"index-url": "--index-url", "extra-index-url": "--extra-index-url", "find-links": "--find-links"}
    found = dict.fromkeys(
        (names[key], value)
        for key, values in re.findall(r"^\S*\.([a-z-]+)='(.*)'$", said, flags=re.MULTILINE)
        if key in names
        for value in values.replace("\\n", " ").split()
    )
    return [part for pair in found for part in pair]


def first_import(folder: Path) -> None:
    """Compile what a server imports, and only that: each of its three processes would do it again at every start."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    variables |= {"SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1"}
    said = subprocess.run(
        [str(python_of(folder)), "-c", FIRST_IMPORT], env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if said.returncode:
        sys.stderr.write(said.stdout.decode(errors="replace")[-2000:])
        raise subprocess.CalledProcessError(said.returncode, "the first import of sglang")


def run(command: list[str]) -> None:
    """Run `command`; its output goes to stderr, because stdout is the path alone."""
    subprocess.run(command, check=True, stdout=sys.stderr)


if __name__ == "__main__":
    print(ensure())
