"""One comparison process: reads pairs of answers from standard input, writes math-verify's verdicts to standard output.

Run as a file by `pool.py`; it imports nothing of this package, so that it starts fast and holds no device. sympy can
hang in compiled code that no Python signal interrupts (`9^{9^{9}}`), hence a process that can be killed.
"""

import json
import os
import resource
import signal
import sys
from typing import Any

MEMORY_BYTES = 4 << 30
"""Address space a comparison may use; beyond it Python raises MemoryError."""
GRACE_S = 5.0
"""The process ends itself this long after the limit, in case the one that watches it is gone."""


def compare(a: str, b: str) -> bool:
    """Whether math-verify finds `a` and `b` equal, either of them taken as the truth: `verify` is not symmetric."""
    from math_verify import verify

    left, right = _parse(a), _parse(b)
    failure: Exception | None = None
    for truth, answer in ((left, right), (right, left)):
        try:
            if verify(truth, answer, timeout_seconds=None, raise_on_error=True):
                return True
        except Exception as error:
            failure = error
    if failure is not None:
        raise failure
    return False


def _parse(answer: str) -> Any:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    configs = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    return parse(f"\\boxed{{{answer}}}", extraction_config=configs, parsing_timeout=None, raise_on_error=True)


def main() -> None:
    """Serve until standard input ends."""
    limit = float(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, resource.RLIM_INFINITY))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for pair in (("x^2+2x+1", "(x+1)^2"), ("(1,2)", "[1,2)"), ("1/3", "0.3")):
        compare(*pair)  # sympy imports much of itself on first use
    _say(answers, {"ready": True})
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, limit + GRACE_S)
        try:
            reply: dict[str, object] = {"equal": compare(*json.loads(line))}
        except (Exception, MemoryError, RecursionError) as error:
            reply = {"error": type(error).__name__}
        signal.setitimer(signal.ITIMER_REAL, 0)
        _say(answers, reply)


def _say(out: Any, reply: dict[str, object]) -> None:
    out.write(json.dumps(reply) + "\n")
    out.flush()


if __name__ == "__main__":
    main()
