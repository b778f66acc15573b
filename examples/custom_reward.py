"""A reward of your own: the vote's margin, shared by the members of the two leading answers.

Run it as a script, and `vote_margin` can be named in any config:

    python examples/custom_reward.py configs/quickstart.yaml run.dir=runs/margin \
        reward.terms.main.name=vote_margin reward.terms.main.sharpness=2.0

To make it known to `urlvr` itself, put the class in a package of yours and name it in that package's pyproject.toml:

    [project.entry-points."megatron_urlvr.reward"]
    vote_margin = "my_package.rewards:VoteMargin"

Providers of signals, tasks and advantages are added the same way (`megatron_urlvr.task`, `megatron_urlvr.advantage`).
"""

from __future__ import annotations

import sys
from collections import Counter

import torch
from pydantic import Field

from megatron_urlvr.config.base import Section
from megatron_urlvr.rewards import Range, Reward, register
from megatron_urlvr.types import Group


class VoteMarginOptions(Section):
    """Options stand beside the reward's name in a config; one without a default must be given."""

    sharpness: float = Field(default=1.0, gt=0)
    """Exponent of the margin: above 1, narrow majorities count for less."""


@register
class VoteMargin(Reward[VoteMarginOptions]):
    """`((c1 - c2) / n)^sharpness` for members of the winning class, minus that for members of the second, else 0.

    Like majority vote, but a group that is split down the middle teaches nothing.
    """

    name = "vote_margin"
    needs = frozenset({"answer"})
    formula = "+m for the winning class, -m for the second, with m = ((c1 - c2) / n)^sharpness"
    value_range = Range(-1, 1)
    source = "examples/custom_reward.py"
    Options = VoteMarginOptions

    def score(self, group: Group) -> torch.Tensor:
        """`[n]` float32. Classes come from the grader; None is an answer that could not be parsed, and never votes."""
        leading = Counter(cls for cls in group.classes if cls is not None).most_common(2)
        sizes = [size for _, size in leading] + [0, 0]
        margin = ((sizes[0] - sizes[1]) / len(group)) ** self.options.sharpness
        worth = dict(zip([cls for cls, _ in leading], [margin, -margin], strict=False))
        return torch.tensor([worth.get(cls, 0.0) if cls is not None else 0.0 for cls in group.classes])


if __name__ == "__main__":
    from megatron_urlvr.config.loader import load_config
    from megatron_urlvr.train import main

    sys.exit(main(load_config(sys.argv[1], sys.argv[2:])))
