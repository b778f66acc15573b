"""Measures the kernels beside their peers, in one run, on whatever device is here.

    python kernels/benchmarks/bench.py                                # a CPU: one thread, float32, T=2048 H=256 V=32768
    python kernels/benchmarks/bench.py --device cuda                  # a GPU: bfloat16, the three shapes of the README
    python kernels/benchmarks/bench.py --shape 8192,4096,18992 --dtype bfloat16

Writes `<out>.json` and `<out>.md`, and prints the latter. Everyone runs once a round in a rotating order. The table has
medians and quartiles, and on a CPU the processor time too, which other programs' load moves less.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from cases import Case, Shape
from measure import Timing, available, errors, extra_memory, time_interleaved
from providers import Provider, all_providers
from report import markdown

CPU_SHAPES = ["2048,256,32768"]
GPU_SHAPES = ["8192,4096,151936", "8192,8192,128256", "4096,5120,152064", "8192,4096,18992"]


def describe(device: torch.device) -> dict[str, Any]:
    """The machine and the versions a figure belongs to."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        name = next(
            (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
        )
    return {
        "device": name,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def _timings(case: Case, providers: Sequence[Provider], repeats: int) -> dict[str, dict[str, Timing]]:
    """Times of everyone's forward without gradients, and of forward and backward."""

    def forward(provider: Provider) -> None:
        with torch.no_grad():
            provider.forward(case)

    def both(provider: Provider) -> None:
        case.clear()
        provider.forward_backward(case)

    return {
        what: time_interleaved({p.name: partial(run, p) for p in providers}, repeats, case.hidden.device)
        for what, run in (("forward", forward), ("forward_backward", both))
    }


def measure_shape(
    shape: Shape, dtype: torch.dtype, device: torch.device, providers: Sequence[Provider], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Times, memory and errors of everyone at one shape."""
    timings = _timings(Case.make(shape, dtype, device), providers, arguments.repeats)
    rows = []
    for provider in providers:
        row: dict[str, Any] = {"name": provider.name, "gives": provider.gives, "gemms": provider.gemms}
        for what, products in (("forward", 1), ("forward_backward", provider.gemms)):
            summary = timings[what][provider.name].summary()
            summary["tflops"] = products * shape.gemm_flops() / summary["median_ms"] / 1e9
            row[what] = summary
        if not arguments.no_memory:
            row["extra_bytes"] = extra_memory(provider, shape, dtype, device, backward=True)
        if not arguments.no_errors and provider.gives:
            row["errors"] = errors(provider, shape, dtype, device, arguments.error_tokens)
        rows.append(row)
    return {"shape": [shape.tokens, shape.width, shape.vocab], "dtype": str(dtype).removeprefix("torch."), "rows": rows}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="float32 (default on a CPU), bfloat16 (default on a GPU), float16, float64")
    parser.add_argument("--shape", action="append", help="T,H,V; may be repeated")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", action="append", help="part of a provider's name; may be repeated")
    parser.add_argument("--skip", action="append", default=[], help="part of a provider's name; may be repeated")
    parser.add_argument("--error-tokens", type=int, default=512, help="tokens that errors are measured on")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-errors", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("kernels_benchmark"), help="where .json and .md go")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs everything; returns 0."""
    arguments = parse(argv)
    device = torch.device(arguments.device)
    torch.set_num_threads(arguments.threads)
    gpu = device.type == "cuda"
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if gpu else "float32"))
    shapes = [Shape.parse(text) for text in arguments.shape or (GPU_SHAPES if gpu else CPU_SHAPES)]
    result: dict[str, Any] = {"machine": describe(device), "results": [], "missing": {}}
    for shape in shapes:
        providers, missing = available(all_providers(2 * shape.tokens * (shape.vocab + 64) * dtype.itemsize), device)
        chosen = [
            p
            for p in providers
            if (not arguments.only or any(part in p.name for part in [*arguments.only, "GEMMs"]))
            and not any(part in p.name for part in arguments.skip)
        ]
        result["missing"] = missing
        result["results"].append(measure_shape(shape, dtype, device, chosen, arguments))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    text = markdown(result)
    arguments.out.with_suffix(".md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
