"""Errors of every output and of every statistic's gradients, ours beside materialised torch's, against float64.

    python kernels/benchmarks/accuracy.py                       # bfloat16 inputs, two shapes
    python kernels/benchmarks/accuracy.py --shape 256,4096,151936 --device cuda

Prints Markdown; of several shapes the larger error. Ours is the worst of the three forms.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from cases import Shape
from measure import errors
from providers import Ours, OursOnePass, TorchEverything
from urlvr_kernels import OUTPUTS

SHAPES = ["256,256,32768", "128,1024,50257"]
STASH = 1 << 40
"""Bytes that hold all logits."""


def compare(
    shape: Shape, dtype: torch.dtype, device: torch.device, limit: int = 1 << 20
) -> dict[str, dict[str, float]]:
    """`{error: {"ours": worst of the forms, "torch": materialised torch's}}`; errors and `limit` as of `errors`."""
    forms = [
        Ours("recompute", 4, OUTPUTS, stash_bytes=0),
        Ours("stash", 3, OUTPUTS, stash_bytes=STASH),
        OursOnePass("one pass", 3, OUTPUTS),
    ]
    ours = [errors(form, shape, dtype, device, limit) for form in forms]
    plain = errors(TorchEverything(), shape, dtype, device, limit)
    return {name: {"ours": max(form[name] for form in ours), "torch": error} for name, error in plain.items()}


def table(found: dict[str, dict[str, float]]) -> str:
    """Markdown: a row for each output, and one for the gradients of all statistics together."""
    lines = ["| | value: ours | torch | hidden grad: ours | torch | weight grad: ours | torch |", "|---" * 7 + "|"]
    for name in (*OUTPUTS, ""):
        keys = (name, *(f"{name}, {what} grad" if name else f"{what} grad" for what in ("hidden", "weight")))
        cells = [f"{found[key][who]:.1e}" if key in found else "" for key in keys for who in ("ours", "torch")]
        lines.append("| " + " | ".join((name or "all together", *cells)) + " |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--shape", action="append", help="T,H,V; may be repeated")
    arguments = parser.parse_args(argv)
    worst: dict[str, dict[str, float]] = {}
    for text in arguments.shape or SHAPES:
        found = compare(Shape.parse(text), getattr(torch, arguments.dtype), torch.device(arguments.device))
        worst = {k: {who: max(x, worst.get(k, found[k])[who]) for who, x in both.items()} for k, both in found.items()}
    print(table(worst))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
