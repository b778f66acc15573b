"""Named extension points: what the program brings, and what other packages add through entry points."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Generic, TypeVar

from megatron_urlvr.config.base import UnknownName

T = TypeVar("T")


class Registry(Generic[T]):
    """Things of one kind by name. A name from the entry point group `megatron_urlvr.<kind>` is imported when it is
    asked for, not before; a name that the program has itself cannot be taken over by another package."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.group = f"megatron_urlvr.{kind}"
        self._own: dict[str, T] = {}
        self._loaded: dict[str, T] = {}

    def add(self, name: str, thing: T) -> T:
        """Register `thing` as `name`. ValueError if the name is taken."""
        if name in self._own:
            raise ValueError(f"there are two things called {name!r} among the {self.kind}s; give one another name")
        self._own[name] = thing
        return thing

    def names(self) -> list[str]:
        """All known names, sorted; nothing is imported."""
        return sorted({*self._own, *(point.name for point in entry_points(group=self.group))})

    def get(self, name: str) -> T:
        """The thing called `name`. UnknownName if there is none."""
        if name in self._own:
            return self._own[name]
        if name not in self._loaded:
            points = [point for point in entry_points(group=self.group) if point.name == name]
            if not points:
                raise UnknownName(self.kind, name, self.names())
            if len({point.value for point in points}) > 1:
                raise ValueError(
                    f"{self.kind} {name!r} is offered by several installed packages "
                    f"({', '.join(sorted(point.value for point in points))}); uninstall all but one"
                )
            self._loaded[name] = points[0].load()
        return self._loaded[name]
