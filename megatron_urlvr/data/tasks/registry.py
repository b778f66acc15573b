"""Tasks by name: the built-in ones and those of entry points (`megatron_urlvr.task`)."""

import difflib
import importlib
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from ..errors import DataError
from .base import Task

GROUP = "megatron_urlvr.task"
BUILT_IN = {
    "chain_sum": "megatron_urlvr.data.tasks.chain_sum:ChainSum",
    "countdown": "megatron_urlvr.data.tasks.countdown:Countdown",
}


def available() -> list[str]:
    """Names of all tasks, sorted."""
    return sorted({*BUILT_IN, *(point.name for point in entry_points(group=GROUP))})


def get_task(name: str, settings: dict[str, Any] | None = None) -> Task:
    """The task `name` with `settings`. DataError for an unknown name or wrong settings."""
    return task_class(name)(settings)


def task_class(name: str) -> type[Task]:
    """The class of the task `name`. A built-in name cannot be taken over. DataError if there is none."""
    if name in BUILT_IN:
        module, attribute = BUILT_IN[name].split(":")
        return getattr(importlib.import_module(module), attribute)
    for point in entry_points(group=GROUP):
        if point.name == name:
            return _load(point)
    near = difflib.get_close_matches(name, available(), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise DataError(f"there is no task {name!r}{hint} (known: {', '.join(available())})")


def _load(point: EntryPoint) -> type[Task]:
    """The class an entry point names."""
    loaded = point.load()
    if not (isinstance(loaded, type) and issubclass(loaded, Task)):
        raise DataError(f"entry point {point.name!r} of group {GROUP} is {loaded!r}; a subclass of Task is expected")
    return loaded
