"""`urlvr theory`: sharpening computed in tables, printed and plotted beside its closed forms."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_urlvr.analysis.sharpening import (
    Floats,
    first_step_mass,
    fixed_reference_limit,
    iterate,
    majority_mass,
    partial_contraction,
    policy,
    sampled_vote_paths,
    winner_probabilities,
)
from megatron_urlvr.exit_codes import UnusableInput
from megatron_urlvr.run.folder import write_bytes, write_json

from .outputs import make_folder, writing

PATHS = 4000
"""Simulated paths of sampled votes."""
EXACT_TERMS = 200_000
"""Most outcomes of a vote that are counted exactly."""


def print_theory(
    weights: Sequence[float], *, beta: float, eta: float, votes: int, steps: int, seed: int, out: Path | None
) -> None:
    """Print the four regimes from a start `weights` beside their closed forms; `out` takes figure and JSON.
    UnusableInput for what is no policy."""
    try:
        start = policy(weights)
    except ValueError as error:
        raise UnusableInput(f"--policy: {error}.") from error
    found = compute(start, beta=beta, eta=eta, votes=votes, steps=steps, seed=seed)
    print(_text(found), end="")
    if out is not None:
        with writing(f"--out {out}"):
            make_folder(out, f"--out {out}")
            write_json(out / "theory.json", found)
            write_bytes(out / "theory.png", _figure(found))
        print(f"written to {out / 'theory.json'} and {out / 'theory.png'}")


def compute(start: Floats, *, beta: float, eta: float, votes: int, steps: int, seed: int) -> dict[str, Any]:
    """Mass of the majority after 0..steps updates in each regime, its closed forms, and the largest difference."""
    mode = int(np.argmax(start))
    p0, at = float(start[mode]), np.arange(steps + 1)
    moving = iterate(start, beta=beta, steps=steps)[:, mode]
    fixed = iterate(start, beta=beta, steps=steps, reference="fixed")[:, mode]
    partial = iterate(start, beta=beta, steps=steps, eta=eta)[:, mode]
    sampled, ends = sampled_vote_paths(
        start, beta=beta, n=votes, steps=steps, paths=PATHS, rng=np.random.default_rng(seed)
    )
    closed_moving = majority_mass(p0, beta, at)
    limit = fixed_reference_limit(p0, beta)
    closed_fixed = np.where(at == 0, p0, limit)
    found: dict[str, Any] = {
        "policy": start.tolist(),
        "beta": beta,
        "eta": eta,
        "votes": votes,
        "steps": at.tolist(),
        "moving": {"mass": moving.tolist(), "closed": closed_moving.tolist()},
        "fixed": {"mass": fixed.tolist(), "closed": closed_fixed.tolist(), "limit": limit},
        "partial": {"mass": partial.tolist(), "contraction": partial_contraction(beta, eta)},
        "sampled": {
            "mass": sampled.tolist(),
            "paths": PATHS,
            "share_ending_at_the_mode": float((ends == mode).mean()),
        },
        "largest_difference": float(max(abs(moving - closed_moving).max(), abs(fixed - closed_fixed).max())),
    }
    if _outcomes(votes, len(start)) <= EXACT_TERMS:
        found["sampled"] |= {
            "winner_probabilities": winner_probabilities(start, votes).tolist(),
            "expected_after_one_step": first_step_mass(start, beta, votes),
        }
    return found


def _outcomes(n: int, answers: int) -> int:
    return math.comb(n + answers - 1, answers - 1)


def _text(found: dict[str, Any]) -> str:
    columns = ("moving", "closed form", "fixed", "closed form", f"partial {found['eta']:g}", f"{found['votes']} votes")
    series = [
        found["moving"]["mass"],
        found["moving"]["closed"],
        found["fixed"]["mass"],
        found["fixed"]["closed"],
        found["partial"]["mass"],
        found["sampled"]["mass"],
    ]
    shown = [step for step in found["steps"] if step <= 5 or step % 5 == 0]
    lines = [
        f"mass of the majority; policy {[round(p, 4) for p in found['policy']]}, beta {found['beta']:g}",
        "  step" + "".join(f"{name:>13}" for name in columns),
        *(f"{step:>6}" + "".join(f"{values[step]:>13.6f}" for values in series) for step in shown),
        "",
        f"largest difference from the closed forms   {found['largest_difference']:.1e}",
        f"fixed reference stays at                   {found['fixed']['limit']:.6f}",
        f"partial steps contract the rest by         {found['partial']['contraction']:.6f} a step in the limit",
    ]
    sampled = found["sampled"]
    share = sampled["share_ending_at_the_mode"]
    error = (share * (1 - share) / sampled["paths"]) ** 0.5
    lines.append(f"votes of {found['votes']} samples end at the mode in    {share:.4f} ± {error:.4f} of the paths")
    if "winner_probabilities" in sampled:
        chances = ", ".join(f"{p:.4f}" for p in sampled["winner_probabilities"])
        lines.append(f"each answer wins the first vote with       {chances}")
        lines.append(f"expected mass after one sampled vote       {sampled['expected_after_one_step']:.6f}")
    return "\n".join(lines) + "\n"


def _figure(found: dict[str, Any]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = found["steps"]
    axes.plot(steps, found["moving"]["mass"], "o", ms=4, color="C0", label="moving reference")
    axes.plot(steps, found["moving"]["closed"], color="C0", lw=1, label="its closed form")
    axes.plot(steps, found["fixed"]["mass"], "s", ms=4, color="C1", label="fixed reference")
    axes.plot(steps, found["fixed"]["closed"], color="C1", lw=1, label="its closed form")
    axes.plot(steps, found["partial"]["mass"], color="C2", ls="--", label=f"partial steps, {found['eta']:g} of the way")
    axes.plot(steps, found["sampled"]["mass"], color="C3", ls=":", label=f"votes of {found['votes']} samples, mean")
    axes.set(xlabel="step", ylabel="mass of the majority", ylim=(0, 1.02))
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=130)
    return target.getvalue()
