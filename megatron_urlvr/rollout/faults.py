"""What goes wrong between the trainer and its servers, by kind, and how a run ends when nobody is left to ask."""

from __future__ import annotations

from collections import Counter
from typing import Literal, get_args

FaultKind = Literal[
    "connection",  # refused, reset, closed in the middle of an answer
    "timeout",  # no answer within the limit
    "http_4xx",
    "http_5xx",
    "truncated",  # not JSON to the end
    "schema",  # JSON of another shape
    "wrong_request",  # the answer to something else
    "token_range",  # an id outside the vocabulary
    "logprob",  # missing, NaN, infinite, positive, or for other tokens
    "length",  # counts that contradict each other or the request
    "finish",  # ended for a reason that the tokens contradict
    "aborted",  # given up by the server
    "version",  # generated with other weights
]
FAULT_KINDS: tuple[FaultKind, ...] = get_args(FaultKind)


class Fault(Exception):  # noqa: N818 - one event among many; the run goes on
    """One request failed. It is counted, and asked again elsewhere."""

    def __init__(self, kind: FaultKind, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail


class RolloutFailed(Exception):  # noqa: N818 - says what happened, as exit codes do
    """No responses can be had any more. The message is a sentence for `status.json`; the run saves and exits 5."""


class Abandoned(Exception):  # noqa: N818 - not an error
    """Generation was given up because the process was asked to stop."""


class FaultCounts:
    """Faults by kind since the last report."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def add(self, fault: Fault) -> None:
        """Count one."""
        self.counts[fault.kind] += 1

    def take(self) -> dict[str, float]:
        """`rollout/faults` in all and `rollout/faults/<kind>` of those that occurred; then starts at zero."""
        taken, self.counts = self.counts, Counter()
        by_kind = {f"rollout/faults/{kind}": float(count) for kind, count in sorted(taken.items())}
        return {"rollout/faults": float(sum(taken.values()))} | by_kind
