"""`urlvr bench`: the benchmarks of the source tree, under one name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import urlvr_kernels

from megatron_urlvr.exit_codes import UnusableInput


def bench_kernels(arguments: Sequence[str]) -> int:
    """Run `kernels/benchmarks/bench.py` with `arguments`, in a process of its own. Returns its exit code.

    UnusableInput where the package was installed without its source tree.
    """
    script = Path(urlvr_kernels.__file__).parents[1] / "benchmarks" / "bench.py"
    if not script.is_file():
        raise UnusableInput(
            f"urlvr bench kernels: {script} is not there. The benchmarks come with the source tree: install with"
            " `pip install -e .` from a checkout, or run kernels/benchmarks/bench.py of one."
        )
    return subprocess.run([sys.executable, str(script), *arguments]).returncode
