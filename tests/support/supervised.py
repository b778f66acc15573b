"""A server under `urlvr rollout serve`, as tests see it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
START_S = 600
"""A server needs a minute alone, and several on a busy machine."""


@dataclass
class Served:
    """The supervised server."""

    folder: Path
    """The model it was started with."""
    run: Path
    supervisor: subprocess.Popen[str]

    @property
    def servers(self) -> Path:
        return self.run / "servers"

    def announcements(self) -> list[dict[str, Any]]:
        """Of all servers that are ready, in order of their ids."""
        found = []
        for path in sorted(self.servers.glob("*.json")):
            with contextlib.suppress(FileNotFoundError):  # withdrawn since the listing
                found.append(dict(json.loads(path.read_text(encoding="utf-8"))))
        return found

    def wait_for(self, count: int) -> list[dict[str, Any]]:
        """The announcements of `count` servers, once all are ready."""
        deadline = time.monotonic() + START_S
        while len(found := self.announcements()) < count:
            assert self.supervisor.poll() is None, f"the supervisor ended; see {self.run}/serve.log"
            assert time.monotonic() < deadline, f"no {count} servers within {START_S} s; see {self.servers}"
            time.sleep(0.2)
        return found

    def wait_until_replaced(self, ended: dict[str, Any]) -> None:
        """Until a server that ended is there again, as another process."""
        deadline = time.monotonic() + START_S
        while not any(a["id"] == ended["id"] and a["pid"] != ended["pid"] for a in self.announcements()):
            assert self.supervisor.poll() is None, f"the supervisor ended; see {self.run}/serve.log"
            assert time.monotonic() < deadline, f"{ended['id']} did not come back within {START_S} s"
            time.sleep(0.2)

    def announcement(self) -> dict[str, Any] | None:
        for path in self.servers.glob("*.json"):
            return dict(json.loads(path.read_text(encoding="utf-8")))
        return None

    def wait(self, *, other_than: str = "") -> dict[str, Any]:
        """The announcement of a server that was not started at `other_than`."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert self.supervisor.poll() is None, f"the supervisor ended; see {self.run}/serve.log"
            found = self.announcement()
            if found is not None and found["started"] != other_than:
                return found
            time.sleep(0.2)
        raise AssertionError(f"no server within {START_S} s; see {self.servers}")
