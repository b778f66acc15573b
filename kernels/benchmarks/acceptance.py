"""Accepts the kernels on a GPU: correctness, accuracy, bits, waiting, memory and speed, in under eight minutes.

    python kernels/benchmarks/acceptance.py --out acceptance

Exit code 0: every target met; 1: some missed or not measured; 2: no GPU. Ratios are to the bare GEMMs of the same run.
Peers are measured where they are installed. What the time limit cuts off is reported as not measured, never as met.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from accuracy import compare
from bench import describe
from cases import Case, Shape
from measure import extra_memory, time_interleaved
from providers import GemmFloor, Ours, OursOnePass, Provider, Verl
from urlvr_kernels import logits_stats

SHAPES = (Shape(8192, 4096, 151936), Shape(8192, 8192, 128256), Shape(4096, 5120, 152064))
DTYPE = torch.bfloat16
REPEATS = 15


@dataclass
class Finding:
    """One target and what was found: `value <= limit` (or `>=`), None where it was not measured."""

    name: str
    value: float | None
    limit: float
    at_least: bool = False
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target was met; None where it was not measured."""
        if self.value is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def correctness() -> list[Finding]:
    """The GPU tests, in a process of their own."""
    tests = Path(__file__).parents[2] / "tests" / "gpu" / "test_token_statistics_on_gpu.py"
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", str(tests)], capture_output=True, text=True)
    print(done.stdout[-3000:])
    return [Finding("GPU tests failing (exit code of pytest)", float(done.returncode), 0.0)]


def speed(shape: Shape, device: torch.device) -> list[Finding]:
    """Forward, backward and both, over the bare GEMMs of the same run; verl's kernel over ours."""
    case = Case.make(shape, DTYPE, device)
    all_logits = 2 * shape.tokens * (shape.vocab + 64) * DTYPE.itemsize
    floor, recompute = GemmFloor(), Ours("recompute", 4, stash_bytes=0)
    forms: list[Provider] = [
        Ours("stash", 3, stash_bytes=all_logits),
        OursOnePass("upstream", 3, stash_bytes=all_logits),
    ]
    peers = [peer for peer in (Verl(),) if peer.unavailable(device) is None]

    def forward(provider: Provider) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                provider.forward(case)

        return run

    def both(provider: Provider) -> Callable[[], None]:
        def run() -> None:
            case.clear()
            provider.forward_backward(case)

        return run

    everyone = [floor, recompute, *forms, *peers]
    one = time_interleaved({p.name: forward(p) for p in [floor, recompute, *peers]}, REPEATS, device, warmup=3)
    two = time_interleaved({p.name: both(p) for p in everyone}, REPEATS, device, warmup=3)
    f = {name: timing.summary()["median_ms"] for name, timing in one.items()}
    b = {name: timing.summary()["median_ms"] for name, timing in two.items()}
    three, backward = b[floor.name], {name: b[name] - f[name] for name in f}
    note = f"GEMMs alone: {f[floor.name]:.2f} ms forward, {three:.2f} ms forward and backward"
    found = [
        Finding(f"{shape}: forward / 1 GEMM", f[recompute.name] / f[floor.name], 1.15, note=note),
        Finding(f"{shape}: recomputing backward / 3 GEMMs", backward[recompute.name] / three, 1.15),
        *(Finding(f"{shape}: {p.name}, forward and backward / 3 GEMMs", b[p.name] / three, 1.12) for p in forms),
    ]
    for what, times, limit in (("forward", f, 1.5), ("backward", backward, 1.3)):
        value = times[Verl.name] / times[recompute.name] if peers else None
        found.append(Finding(f"{shape}: verl's {what} / ours", value, limit, at_least=True))
    return found


def bandwidth(shape: Shape, device: torch.device) -> list[Finding]:
    """logits_stats, forward, all statistics, over the bandwidth of a copy."""
    logits = torch.randn(shape.tokens, shape.vocab, device=device, dtype=DTYPE)
    target = torch.randint(0, shape.vocab, (shape.tokens,), device=device)
    other = torch.empty_like(logits)
    found = []
    for backend in ("triton", "cuda"):
        try:
            logits_stats(logits[:1], target[:1], backend=backend)
        except (RuntimeError, ValueError) as error:
            found.append(Finding(f"{shape}: logits_stats ({backend}) / copy bandwidth", None, 0.85, True, str(error)))
            continue
        runs = {
            "copy": lambda: other.copy_(logits),
            "stats": lambda backend=backend: logits_stats(logits, target, backend=backend),
        }
        times = {k: t.summary()["median_ms"] for k, t in time_interleaved(runs, REPEATS, device, warmup=3).items()}
        share = times["copy"] / 2 / times["stats"]  # a copy moves every byte twice
        note = f"{times['stats']:.3f} ms, {logits.numel() * 2 / times['stats'] / 1e6:.0f} GB/s"
        found.append(Finding(f"{shape}: logits_stats ({backend}) / copy bandwidth", share, 0.85, True, note))
    return found


def memory(shape: Shape, device: torch.device) -> list[Finding]:
    """What the recomputing form needs beyond inputs and gradients."""
    extra = extra_memory(Ours("recompute", 4, stash_bytes=0), shape, DTYPE, device, backward=True)
    return [Finding(f"{shape}: MB beyond inputs and gradients", extra / 1e6, 300.0)]


def accuracy(shape: Shape, device: torch.device) -> list[Finding]:
    """Errors against float64 over those of materialised torch, on some of the tokens."""
    found = compare(shape, DTYPE, device, limit=256)
    return [
        # Of logits that round alike, either may be named the largest.
        Finding(
            f"{shape}: error of {name} / materialised torch's",
            both["ours"] / (both["torch"] + 1e-12),
            2.0 if name == "argmax" else 1.2,
        )
        for name, both in found.items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all stages within the limit; 0 if every measured target is met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("kernels_acceptance"))
    parser.add_argument("--limit-s", type=float, default=460.0)
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("No GPU is here: the targets for GPUs are not measured.")
        return 2
    device = torch.device("cuda")
    started = time.monotonic()
    stages: list[tuple[str, Callable[[], list[Finding]]]] = [("correctness", correctness)]
    for measure in (speed, memory, accuracy, bandwidth):
        stages += [
            (f"{measure.__name__} at {shape}", lambda measure=measure, shape=shape: measure(shape, device))
            for shape in SHAPES
        ]
    findings: list[Finding] = []
    skipped = []
    for name, stage in stages:
        if time.monotonic() - started > arguments.limit_s:
            skipped.append(name)
            continue
        findings += stage()
        torch.cuda.empty_cache()
        print(f"{time.monotonic() - started:6.1f} s  {name}", flush=True)
    return write(findings, skipped, device, arguments.out)


def write(findings: list[Finding], skipped: list[str], device: torch.device, out: Path) -> int:
    """JSON and Markdown, and the exit code."""
    words = {True: "met", False: "MISSED", None: "not measured"}
    rows = "".join(
        f"| {f.name} | {'' if f.value is None else f'{f.value:.3f}'} | {'>=' if f.at_least else '<='} {f.limit} "
        f"| {words[f.met]} | {f.note} |\n"
        for f in findings
    )
    machine = describe(device)
    head = "| target | found | limit | | |\n" + "|---" * 5 + "|\n"
    text = f"# Acceptance on {machine['device']}\n\n{machine}\n\n{head}{rows}"
    if skipped:
        text += "\nNot measured for want of time: " + "; ".join(skipped) + "\n"
    out.with_suffix(".md").write_text(text)
    data = {"machine": machine, "findings": [asdict(f) | {"met": f.met} for f in findings], "skipped": skipped}
    out.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
    print(text)
    return 1 if skipped or any(f.met is False for f in findings) else 0


if __name__ == "__main__":
    raise SystemExit(main())
