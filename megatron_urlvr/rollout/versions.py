"""What versions of the weights are called on servers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Versions:
    """`<session>-<version>`: the session names the trainer's process, so that no other's weights are taken for its
    own."""

    session: str
    served: int = 0
    """The version that servers hold."""
    coming: int | None = None
    """The version on its way to them."""

    def of(self, version: int) -> str:
        """The label of `version`."""
        return f"{self.session}-{version}"

    @property
    def label(self) -> str:
        """Of what servers hold."""
        return self.of(self.served)

    def since(self, oldest: int) -> dict[str, int]:
        """Versions by label: `oldest`, newer ones, and the one on its way, which some servers hold before others."""
        newest = self.served if self.coming is None else max(self.served, self.coming)
        return {self.of(version): version for version in range(min(oldest, newest), newest + 1)}
