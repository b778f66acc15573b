"""Where results go: what cannot be written is said in a sentence, and before the work where that takes long."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_urlvr.exit_codes import DISK_FULL, UnusableInput


@contextmanager
def writing(what: str) -> Iterator[None]:
    """UnusableInput, naming `what` (`--out x.json`), where the body cannot write. A full disk stays an OSError."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise UnusableInput(f"{what} cannot be written: {error.strerror}.") from error


def make_folder(folder: Path, what: str) -> Path:
    """`folder`, made where it is not there. UnusableInput, naming `what`, when it cannot be made or written to."""
    with writing(what):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise UnusableInput(f"{what} cannot be written: {folder} is read-only.")
    return folder


def make_parent(file: Path, what: str) -> Path:
    """`file`, in a folder that is there now. UnusableInput, naming `what`, when it cannot become a file."""
    if file.is_dir():
        raise UnusableInput(f"{what} is a folder: give a file.")
    make_folder(file.parent, what)
    return file
