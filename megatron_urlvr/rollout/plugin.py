"""Token statistics from the servers: how this program's SGLang plug-in gets into them, and whether it is there."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import urlvr_kernels
from urlvr_kernels.sglang_plugin import ALLOWED, SETTING

from ..exit_codes import UnusableInput
from .client import ServerClient
from .faults import Fault

ENTRY_POINTS = "[sglang.srt.plugins]\nurlvr_token_stats = urlvr_kernels.sglang_plugin:register\n"
METADATA = "Metadata-Version: 2.1\nName: urlvr-kernels\nVersion: 0\n"
LOGP = "logp"
"""Servers give it without a plug-in."""


def unavailable(names: Sequence[str]) -> list[str]:
    """Those of the statistics `names` that servers cannot give."""
    return sorted(set(names) - {LOGP, *ALLOWED})


def plugin_environment(folder: Path, names: Sequence[str], variables: Mapping[str, str]) -> dict[str, str]:
    """Variables with which a server loads the plug-in and computes the statistics `names`; nothing without names.

    `folder` gets a link to the `urlvr_kernels` of this environment and the entry point that SGLang looks for: nothing
    is installed into the servers' environment, and both sides run the same code.
    """
    wanted = sorted(set(names) - {LOGP})
    if not wanted:
        return {}
    package, info = folder / "urlvr_kernels", folder / "urlvr_kernels-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(METADATA, encoding="utf-8")
    (info / "entry_points.txt").write_text(ENTRY_POINTS, encoding="utf-8")
    source = Path(urlvr_kernels.__path__[0]).resolve()
    if not package.is_symlink() or package.resolve() != source:
        temporary = folder / f"urlvr_kernels.{os.getpid()}"
        temporary.symlink_to(source)
        temporary.rename(package)
    path = [str(folder.resolve()), *filter(None, [variables.get("PYTHONPATH")])]
    return {SETTING: ",".join(wanted), "PYTHONPATH": os.pathsep.join(path)}


async def require_statistics(clients: Sequence[ServerClient], names: Sequence[str], timeout: float) -> None:
    """Ask every server for one token. UnusableInput when its statistics do not come with it."""
    body: dict[str, Any] = {
        "input_ids": [0],
        "rid": "token-statistics",
        "return_logprob": True,
        "sampling_params": {"max_new_tokens": 1, "temperature": 1.0, "top_p": 1.0, "stop_token_ids": [0]},
    }
    for client in clients:
        try:
            answer = await client.call("/generate", body, timeout=timeout)
        except Fault:
            continue  # whoever cannot answer now is found out when it matters
        meta = answer.get("meta_info", {}) if isinstance(answer, Mapping) else {}
        if missing := [name for name in names if name != LOGP and not meta.get(name)]:
            raise UnusableInput(
                f"reward.statistics = servers: {client.url} gives no {' and no '.join(missing)} with its tokens."
                " Servers that `urlvr rollout serve` starts load the plug-in themselves; into the environment of others"
                f" install urlvr-kernels, and start them with {SETTING}={','.join(n for n in names if n != LOGP)}."
                " Or set reward.statistics=trainer."
            )
