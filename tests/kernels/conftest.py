"""Says at the end of a run whether the CUDA sources were compiled in it."""

from __future__ import annotations

from typing import Any

COMPILES = "test_the_sources_compile_for_sm_80_and_sm_90_and_the_result_is_kept"
"""The test in test_cuda_sources.py that compiles them."""


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for outcome in ("passed", "skipped", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, ()):
            if report.nodeid.endswith(COMPILES):
                terminalreporter.write_line(f"CUDA sources: {said_of(outcome, report.longrepr)}")


def said_of(outcome: str, longrepr: Any) -> str:
    """What became of them, and why they were not compiled; `longrepr` as of a test report of pytest."""
    if outcome == "skipped":
        return f"not compiled, {longrepr[2].removeprefix('Skipped: ')}."
    return "compiled for sm_80 and sm_90." if outcome == "passed" else "compiling them failed, see above."
