"""A disk without room, as one process meets it."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager

NO_LIMIT = resource.RLIM_INFINITY


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system refuses to let any file of this process grow beyond `size` bytes, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
