"""How it is measured: time with its spread, memory beyond inputs and gradients, error against float64."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from cases import Case, Shape
from providers import Provider
from urlvr_kernels import reference


@dataclass
class Timing:
    """Milliseconds of each run: by the clock, and of processor time (CPU only; unmoved by other programs' load)."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """Median and quartiles."""
        out = {"median_ms": statistics.median(self.wall), "min_ms": min(self.wall)}
        if len(self.wall) > 1:
            low, _, high = statistics.quantiles(self.wall, n=4, method="inclusive")
            out |= {"q1_ms": low, "q3_ms": high}
        if self.cpu:
            out["cpu_median_ms"] = statistics.median(self.cpu)
        return out


def time_interleaved(
    runs: dict[str, Callable[[], object]], repeats: int, device: torch.device, warmup: int = 1
) -> dict[str, Timing]:
    """Runs everyone once a round, starting with another one each round, so that drift and load fall on all alike."""
    timings = {name: Timing() for name in runs}
    names = list(runs)
    for turn in range(warmup + repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            wall, cpu = _time_once(runs[name], device)
            if turn >= warmup:
                timings[name].wall.append(wall)
                if device.type == "cpu":
                    timings[name].cpu.append(cpu)
    return timings


def _time_once(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    if device.type == "cuda":
        _flush_l2(device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize(device)
        return begin.elapsed_time(end), 0.0
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    return (time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3


def _flush_l2(device: torch.device) -> None:
    torch.empty(256 << 20, dtype=torch.int8, device=device).zero_()


def extra_memory(provider: Provider, shape: Shape, dtype: torch.dtype, device: torch.device, backward: bool) -> int:
    """Bytes a run needs at most beyond its inputs and gradients."""
    if device.type == "cuda":
        case = Case.make(shape, dtype, device)
        run = provider.forward_backward if backward else provider.forward
        run(case)  # compile, and fill caches
        case.clear()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run(case)
        return torch.cuda.max_memory_allocated(device) - before - _gradient_bytes(case, backward)
    # A CPU's memory is what the kernel counts; a fresh process has no freed memory lying about that would hide some.
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_cpu_memory, (provider, shape, dtype, backward, torch.get_num_threads()))


def _cpu_memory(provider: Provider, shape: Shape, dtype: torch.dtype, backward: bool, threads: int) -> int:
    torch.set_num_threads(threads)
    run = provider.forward_backward if backward else provider.forward
    run(Case.make(Shape(8, shape.width, 64), dtype, torch.device("cpu")))  # libraries loaded, pools made
    case = Case.make(shape, dtype, torch.device("cpu"))
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak so far
    before = _status("VmRSS")
    run(case)
    return _status("VmHWM") - before - _gradient_bytes(case, backward)


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name + ":"))


def _gradient_bytes(case: Case, backward: bool) -> int:
    if not backward:
        return 0
    return sum(x.numel() * x.element_size() for x in (case.hidden, case.weight))


def errors(provider: Provider, shape: Shape, dtype: torch.dtype, device: torch.device, limit: int) -> dict[str, float]:
    """Largest error of each output, relative Frobenius error of the gradients, against float64 from the same inputs.

    argmax: how much larger the largest logit is than the named one. Gradients: of all statistics together ("hidden
    grad") and of each alone ("entropy, hidden grad"). limit: tokens at most (the reference holds all of their logits in
    float64 several times over).
    """
    small = Shape(min(shape.tokens, limit), shape.width, shape.vocab)
    case = Case.make(small, dtype, device)
    hidden, weight = (x.detach().double().requires_grad_() for x in (case.hidden, case.weight))
    names = provider.differentiable
    exact = reference.lm_head_stats(hidden, weight, case.target, outputs=provider.gives)
    with torch.no_grad():
        found = provider.forward(case)
        out = {k: (found[k].double() - getattr(exact, k)).abs().max().item() for k in provider.gives if k in found}
        if "argmax" in found:
            short = (hidden * (weight[exact.argmax] - weight[found["argmax"]])).sum(1)
            out["argmax"] = short.max().item()
    for label, of in (("", names), *((f"{name}, ", (name,)) for name in names)):
        loss = torch.stack([(getattr(exact, name) * case.grads[name]).sum() for name in of]).sum()
        right = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
        case.clear()
        provider.forward_backward(case, of)
        for what, ours, theirs in zip(("hidden", "weight"), (case.hidden.grad, case.weight.grad), right, strict=True):
            assert ours is not None
            out[f"{label}{what} grad"] = ((ours.double() - theirs).norm() / theirs.norm()).item()
    return out


def available(providers: Sequence[Provider], device: torch.device) -> tuple[list[Provider], dict[str, str]]:
    """Who can run here, and why the others cannot."""
    missing = {p.name: reason for p in providers if (reason := p.unavailable(device)) is not None}
    return [p for p in providers if p.name not in missing], missing
