"""`urlvr rewards`: what each reward is, what it needs, and where it is from."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from megatron_urlvr.config.errors import did_you_mean
from megatron_urlvr.exit_codes import UnusableInput
from megatron_urlvr.rewards import RewardInfo, describe


def rewards_text(names: Sequence[str]) -> str:
    """A paragraph for each reward in `names`, all when empty. UnusableInput for a name that is none."""
    known = {info.name: info for info in describe()}
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known)
            raise UnusableInput(f"there is no reward {name!r}.{hint} Known: {', '.join(known)}.")
    return "\n".join(_paragraph(info) for name, info in known.items() if not names or name in names)


def _paragraph(info: RewardInfo) -> str:
    needs = ", ".join(info.needs) or "nothing"
    lines = [
        info.name + (" (supervised: reads labels)" if info.supervised else ""),
        f"  formula  {info.formula}",
        f"  needs    {needs}",
        f"  range    {info.value_range}",
        f"  source   {info.source}",
    ]
    for option in info.options:
        default = "must be given" if option.default is None else f"default {option.default}"
        text = f"{option.name}: {option.type}, {default}. {' '.join(option.doc.split())}".rstrip()
        lines += textwrap.wrap(text, 110, initial_indent="  option   ", subsequent_indent=" " * 13)
    return "\n".join(lines) + "\n"
