"""Servers that keep the weights they started with: judges and teachers that training never touches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..config.servers import POLICY, ServersSection
from .dispatch import Model
from .pool import ServerPool
from .sglang import SGLangEngine
from .versions import Versions

FRESH = "default"
"""What SGLang (0.5.23) calls the weights that a server was started with."""


class Unchanging(Versions):
    """Labels of weights that stay the ones a server started with."""

    def of(self, version: int) -> str:
        """One label, whatever the version."""
        return self.session


class FrozenServers(SGLangEngine):
    """Asks the servers of another pool than the policy's. A server whose weights somebody has updated is fenced."""

    def __init__(
        self,
        servers: ServersSection,
        *,
        pool: str,
        folder: Path,
        model: Path,
        decode: Callable[[Sequence[int]], str],
        served: Model,
        replicas: int = 1,
    ) -> None:
        """`pool`: key of `servers.pools`; see SGLangEngine for the rest."""
        own = servers.model_copy(update={"pools": {POLICY: servers.pools[pool]}})
        super().__init__(
            own,
            folder=folder,
            model=model,
            decode=decode,
            served=served,
            device=torch.device("cpu"),
            session=FRESH,
            replicas=replicas,
            pushes=False,
        )
        self.pool = ServerPool(own.policy, own, folder, name=pool)
        self.versions = Unchanging(FRESH)
