"""Seconds from `srun` to the first step of a run, and where they go. Rank 0 prints the table:

    srun --nodes=2 --ntasks-per-node=2 python examples/benchmarks/cold_start.py $(date +%s.%N) CONFIG [KEY=VALUE]...

The run is an ordinary one, in the config's `run.dir`; take a new folder, or there is no first step.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil


class Stopwatch:
    """Moments since `started` (seconds since 1970)."""

    def __init__(self, started: float) -> None:
        self.marks = [("", started)]

    def mark(self, what: str, at: float | None = None) -> None:
        """What has ended, now or at a moment."""
        self.marks.append((what, time.time() if at is None else at))

    def after(self, what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose first return is marked."""

        def timed(*arguments: Any, **named: Any) -> Any:
            result = function(*arguments, **named)
            if all(name != what for name, _ in self.marks):
                self.mark(what)
            return result

        return timed

    def table(self) -> str:
        """What ended, its own seconds, and seconds since the start."""
        start = self.marks[0][1]
        pairs = zip(self.marks, self.marks[1:], strict=False)
        lines = [f"| {what} | {at - before:.1f} | {at - start:.1f} |" for (_, before), (what, at) in pairs]
        return "\n".join(["| | seconds | since srun |", "|---|---:|---:|", *lines])


def main(started: float, config: str, overrides: list[str]) -> int:
    watch = Stopwatch(started)
    watch.mark("srun starts Python", psutil.Process().create_time())
    from megatron_urlvr import train
    from megatron_urlvr.config.loader import load_config
    from megatron_urlvr.distributed import layout, ranks

    watch.mark("imports: torch, Megatron-Core, transformers")
    ranks.adopt_srun(os.environ)
    loaded = load_config(config, overrides)
    watch.mark("config")
    layout.meet = watch.after("ranks meet", layout.meet)
    layout._describe = watch.after("process groups", layout._describe)
    train.build = watch.after("policy, data, engine", train.build)
    log = train.RunFiles.log

    def logged(files: Any, step: int, metrics: Any) -> None:
        log(files, step, metrics)
        if step <= 1:
            watch.mark("step 0: weights handed over, held-out evaluation" if step == 0 else "the first step")
        if step == 1 and os.environ.get("RANK", "0") == "0":
            print(watch.table(), flush=True)

    train.RunFiles.log = logged  # type: ignore[method-assign]
    return train.main(loaded)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2], sys.argv[3:]))
