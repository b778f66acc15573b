"""`urlvr compare`: two policies on the same problems, from the tables that `urlvr eval` wrote."""

from __future__ import annotations

from pathlib import Path

from megatron_urlvr.analysis.paired import compare, read_table


def print_comparison(one: Path, other: Path) -> None:
    """Print the paired differences. UnusableInput where the tables cannot be compared."""
    found = compare(read_table(one), read_table(other))
    print(f"{'measure':<8}{'one':>8}{'other':>8}{'other - one':>13}   {'95 % interval':<20}better  worse  of")
    for each in found:
        interval = f"[{each.low:+.4f}, {each.high:+.4f}]"
        print(
            f"{each.measure:<8}{each.one:>8.4f}{each.other:>8.4f}{each.difference:>+13.4f}   {interval:<20}"
            f"{each.better:>6}{each.worse:>7}  {each.problems}"
        )
