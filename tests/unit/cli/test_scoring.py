"""Rewards over evaluated samples: what can be ranked, and what a reward is when nobody takes the scale away."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from megatron_urlvr.analysis.alignment import alignment
from megatron_urlvr.commands.scoring import Scorer, scorable
from megatron_urlvr.types import Group, Prompt, Sample, TokenStats


class Policy:
    """Scores every token of a response by what is planted for its length."""

    def __init__(self, logp: dict[int, float]) -> None:
        self.logp = logp

    def score(self, rows, wanted, *, temperature):
        assert wanted == {"logp"}
        return [TokenStats(logp=torch.full((len(row.response),), self.logp[len(row.response)])) for row in rows]


def test_long_responses_are_ranked_by_their_log_probabilities_and_their_underflow_is_said():
    lengths = [3000, 2000, 4000]  # probabilities e^-900, e^-1000, e^-800: all are zero in float64
    policy = Policy({3000: -0.3, 2000: -0.5, 4000: -0.2})
    samples = [Sample("p", i, [1] * length, "", "stop") for i, length in enumerate(lengths)]
    group = Group(Prompt("p", "", (1,)), samples)
    rewards = scorable(["probability"], {}, seed=0)
    (row,) = Scorer(SimpleNamespace(policy=policy), rewards, temperature=None)([group])
    found = alignment([row | {"right": [True, False, True]}], "probability", calibrated=True)
    assert (found["auroc"], found["aligned"]) == (1, 1)
    assert (found["underflow"], found["underflow_float32"]) == (1, 1)
    assert row["rewards"]["probability"] == [0, 0, 0]
    assert found["ece"] == 2 / 3  # of the probabilities as they are, not of their ranks
