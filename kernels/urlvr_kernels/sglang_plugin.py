"""SGLang plug-in: entropy and self-certainty of every generated token, in the response's `meta_info`.

SGLang loads it through the entry point group `sglang.srt.plugins` (SGLang 0.5.23; `SGLANG_PLUGINS` restricts which are
loaded) in the launcher, the schedulers and the detokenizer. The hook runs before the sampler, which divides the logits
by the temperature in place, and puts one value per generated token and statistic into `customized_info`; they arrive as
`meta_info["entropy"]` and so on, lists as long as the output.

`URLVR_TOKEN_STATS` chooses the statistics, by default `entropy,self_certainty`; any of `lse`, `top2_gap`, `max_prob`
too. They are of the distribution that is sampled from before truncation (top-p, top-k): temperature applied, over all
columns the server has logits for. Logits that a grammar or bias masks to -inf make self-certainty infinite.

On a GPU the statistics of a step travel in one asynchronous copy into pinned memory. The scheduler looks at them after
it has waited for the step's tokens, so nothing waits for the device on their account.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from .api import logits_stats

TARGET = "sglang.srt.layers.sampler.Sampler.forward"
SETTING = "URLVR_TOKEN_STATS"
ALLOWED = ("entropy", "self_certainty", "lse", "top2_gap", "max_prob")


def register() -> None:
    """The entry point: hooks SGLang's sampler. ValueError if `URLVR_TOKEN_STATS` names what there is not."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    names = chosen_statistics(os.environ.get(SETTING, "entropy,self_certainty"))

    def before_sampling(
        sampler: object, logits_output: Any, sampling_info: Any, *arguments: object, **keywords: object
    ) -> None:
        add_statistics(logits_output, sampling_info, names)

    HookRegistry.register(TARGET, before_sampling, HookType.BEFORE)


def chosen_statistics(setting: str) -> tuple[str, ...]:
    """The names in a comma-separated setting."""
    names = tuple(name.strip() for name in setting.split(",") if name.strip())
    wrong = [name for name in names if name not in ALLOWED]
    if wrong or not names:
        raise ValueError(f"{SETTING}: {setting!r}; it must be a comma-separated list of {', '.join(ALLOWED)}.")
    return names


def add_statistics(logits_output: Any, sampling_info: Any, names: Sequence[str]) -> None:
    """Adds `{name: one value a row}` to `logits_output.customized_info`.

    logits_output.next_token_logits: `[B, V]`; sampling_info.temperatures: `[B, 1]` (1 for greedy requests).
    """
    logits = logits_output.next_token_logits
    if logits is None or logits.shape[0] == 0:
        return
    temperature = sampling_info.temperatures.reshape(-1)
    stats = logits_stats(logits, None, temperature=temperature, outputs=tuple(names))
    table = StepStatistics(torch.stack([getattr(stats, name).float() for name in names]))
    info = dict(logits_output.customized_info or {})
    info.update({name: StepColumn(table, i) for i, name in enumerate(names)})
    logits_output.customized_info = info


class StepStatistics:
    """The statistics of one step, on their way to the host or there."""

    def __init__(self, table: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = table
        self._values: list[list[float]] | None = None
        if table.is_cuda:
            self._host = torch.empty(table.shape, dtype=table.dtype, pin_memory=True)
            self._host.copy_(table, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(table.device))

    def row(self, i: int) -> list[float]:
        """Values of the i-th statistic, one a request."""
        if self._values is None:
            if self._event is not None:
                self._event.synchronize()
            self._values = self._host.tolist()
        return self._values[i]


class StepColumn:
    """One statistic of one step; SGLang indexes it with a request's place in the batch."""

    def __init__(self, table: StepStatistics, which: int) -> None:
        self._table, self._which = table, which

    def __getitem__(self, request: int) -> float:
        return self._table.row(self._which)[request]

    def __len__(self) -> int:
        return len(self._table.row(self._which))
