"""Where a run comes from: the program's commit and uncommitted changes, versions, and hashes of what went in."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "megatron-urlvr",
    "torch",
    "megatron-core",
    "transformers",
    "numpy",
    "triton",
    "transformer-engine",
    "sglang",
)
PATCH_LIMIT = 1 << 20
"""Uncommitted changes up to this many bytes are kept whole; of larger ones only the hash."""


def provenance(hashes: Mapping[str, str], command: Iterable[str] | None = None) -> dict[str, Any]:
    """What `provenance.json` holds. `hashes` are the caller's fingerprints of data, model and tokenizer."""
    return {
        "command": list(sys.argv if command is None else command),
        "source": source(Path(__file__).resolve().parents[1]),
        "versions": versions(),
        "hashes": dict(hashes),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on; those not installed are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def source(checkout: Path) -> dict[str, Any]:
    """Commit and uncommitted changes of the git checkout that the program runs from; empty when it is installed."""
    if not (checkout / ".git").exists():
        return {}
    commit = _git(checkout, "rev-parse", "HEAD")
    patch = _git(checkout, "diff", "HEAD", "--binary")
    if commit is None or patch is None:
        return {}
    untracked = (_git(checkout, "ls-files", "--others", "--exclude-standard") or b"").decode(errors="replace")
    out: dict[str, Any] = {"commit": commit.decode().strip(), "dirty": bool(patch), "untracked": untracked.splitlines()}
    if patch:
        out["diff_sha256"] = hashlib.sha256(patch).hexdigest()
        if len(patch) <= PATCH_LIMIT:
            out["diff"] = patch.decode("utf-8", errors="replace")
    return out


def _git(checkout: Path, *arguments: str) -> bytes | None:
    try:
        done = subprocess.run(["git", "-C", str(checkout), *arguments], capture_output=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
