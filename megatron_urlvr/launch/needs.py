"""What a config needs of a launch: how many ranks, and rollout servers or not.

It is read without checking the rest, and without torch: NeMo-Run's environment has none. Layers merge plainly here,
which is all that these settings do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ..exit_codes import UnusableInput


@dataclass(frozen=True)
class Needs:
    """What must be there for a run to start."""

    ranks: int | None
    """Processes of its layout; None where `parallel.dp: auto` takes any multiple of `replica`."""
    replica: int
    """Processes of one replica."""
    servers: bool
    """It takes rollouts from servers that somebody has to start for it."""


def needs_of(path: str | Path, overrides: Sequence[str] = ()) -> Needs:
    """The needs of a config (or of the run in a folder) with `overrides` laid over it. UnusableInput where it cannot be
    read."""
    file = Path(path, "config.yaml") if Path(path).is_dir() else Path(path)
    try:
        merged = OmegaConf.merge(_read(file), OmegaConf.from_dotlist(list(overrides)))
        parallel = OmegaConf.select(merged, "parallel") or {}
        dp, replica = parallel.get("dp", "auto"), math.prod(int(parallel.get(size, 1)) for size in ("tp", "pp", "cp"))
        ranks = None if dp == "auto" else int(dp) * replica
        sampled = OmegaConf.select(merged, "rollout.engine") == "sglang"
        served = OmegaConf.select(merged, "servers.pools.policy.urls")
    except (OSError, YAMLError, OmegaConfBaseException, TypeError, ValueError) as error:
        raise UnusableInput(f"{path} cannot be read as a config: {error}") from error
    return Needs(ranks, replica, servers=sampled and not served)


def _read(path: Path) -> Any:
    """The file's settings over those of the files that it extends."""
    layer: Any = OmegaConf.create(path.read_text(encoding="utf-8"))
    parents = layer.pop("extends", [])
    parents = [parents] if isinstance(parents, str) else parents
    return OmegaConf.merge(*(_read(path.parent / parent) for parent in parents), layer)


def ranks_per_node(needs: Needs, nodes: int, gpus: int) -> int:
    """Ranks on each of `nodes`: those of the layout, else one on each of a node's `gpus`, at least one.

    UnusableInput when the layout cannot be spread over the nodes.
    """
    if needs.ranks is None:
        return gpus or 1
    each, rest = divmod(needs.ranks, nodes)
    if rest or (gpus and each > gpus):
        raise UnusableInput(
            f"the layout of the config (parallel.dp x tp x pp x cp) is {needs.ranks} ranks, which {nodes} nodes"
            f"{f' of {gpus} GPUs' if gpus else ''} cannot share evenly: change the number of nodes, or the layout."
        )
    return each
