"""Turns a benchmark's JSON into Markdown."""

from __future__ import annotations

from typing import Any

COLUMNS = (
    "",
    "forward ms",
    "/ floor",
    "fwd+bwd ms (quartiles)",
    "CPU ms",
    "/ floor",
    "TFLOP/s",
    "extra MB",
)
ERRORS = ("logp", "entropy", "self_certainty", "hidden grad", "weight grad")


def markdown(result: dict[str, Any]) -> str:
    """Tables of every shape, and who was not measured and why."""
    machine = result["machine"]
    where = f"{machine['device']}, torch {machine['torch']}, Python {machine['python']}, {machine['date']}"
    where += f", {machine['threads']} thread(s)" if machine["threads"] else f", CUDA {machine['cuda']}"
    parts = [f"# Kernel benchmark\n\n{where}\n"]
    for block in result["results"]:
        tokens, width, vocab = block["shape"]
        parts.append(f"\n## T={tokens}, H={width}, V={vocab}, {block['dtype']}\n\n{_times(block['rows'])}")
        if any("errors" in row for row in block["rows"]):
            parts.append(
                f"\nErrors against float64 (statistics: largest; gradients: relative norm)\n\n{_errors(block['rows'])}"
            )
    if result["missing"]:
        missing = "\n".join(f"- {name}: {reason}" for name, reason in result["missing"].items())
        parts.append(f"\nNot measured:\n\n{missing}\n")
    return "".join(parts)


def _times(rows: list[dict[str, Any]]) -> str:
    floor = next((row for row in rows if not row["gives"]), None)
    lines = [COLUMNS]
    for row in rows:
        forward, both = row["forward"], row["forward_backward"]
        spread = f" ({both['q1_ms']:.1f}-{both['q3_ms']:.1f})" if "q1_ms" in both else ""
        lines.append(
            (
                row["name"],
                f"{forward['median_ms']:.1f}",
                _ratio(forward, floor and floor["forward"]),
                f"{both['median_ms']:.1f}{spread}",
                f"{both['cpu_median_ms']:.1f}" if "cpu_median_ms" in both else "",
                _ratio(both, floor and floor["forward_backward"]),
                f"{both['tflops']:.3g}",
                f"{row['extra_bytes'] / 1e6:.1f}" if "extra_bytes" in row else "",
            )
        )
    return _table(lines)


def _ratio(summary: dict[str, float], floor: dict[str, float] | None) -> str:
    if floor is None:
        return ""
    key = "cpu_median_ms" if "cpu_median_ms" in summary else "median_ms"
    return f"{summary[key] / floor[key]:.2f}"


def _errors(rows: list[dict[str, Any]]) -> str:
    lines = [("", *ERRORS)]
    for row in rows:
        if "errors" in row:
            lines.append((row["name"], *(f"{row['errors'][k]:.1e}" if k in row["errors"] else "" for k in ERRORS)))
    return _table(lines)


def _table(lines: list[tuple[str, ...]]) -> str:
    head, *body = ("| " + " | ".join(line) + " |\n" for line in lines)
    return head + "|" + "---|" * len(lines[0]) + "\n" + "".join(body)
