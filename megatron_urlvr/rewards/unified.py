"""The family of rewards that the URLVR study writes as one formula, and which rewards belong to it.

`r(x, y) = psi(sigma / |I| * sum_{i in I} H(q_i, pi_i))`, with the cross-entropy `H(q, pi) = -sum_v q_v log pi_v`, sigma
+1 or -1, psi the identity or exp (arXiv 2603.08660, section 3). Instances, each shown numerically in
tests/unit/rewards/test_unified.py:

| reward                        | q_i          | pi_i                 | sigma | I         | 1/|I| | psi |
|-------------------------------|--------------|----------------------|-------|-----------|-------|-----|
| self_certainty (+ log V)      | uniform      | policy               | +1    | tokens    | mean  | id  |
| token_entropy                 | policy       | policy               | -1    | tokens    | both  | id  |
| trajectory_entropy            | delta(y_t)   | policy               | -1    | tokens    | both  | id  |
| probability                   | delta(y_t)   | policy               | -1    | tokens    | sum   | exp |
| majority_vote                 | delta(winner)| delta(answer of y)   | -1    | {answer}  | --    | exp |
| srt_vote, soft                | delta(answer of y) | shares of the group | -1 | {answer} | --    | exp |
| semantic_entropy, ungated (1) | delta(answer of y) | shares of the group | -1 | {answer} | --    | exp |
| co_rewarding (2)              | delta(winner')| delta(answer of y)  | -1    | {answer}  | --    | exp |

(1) on responses with an answer; a group that the gate closes, and a response without one, are given numbers apart.
(2) winner': that of the other vote, on the paraphrase or by the teacher.

With the policy's own distribution over answers as the second argument, as a reader may take the study's table, the
"vote" is the winner's probability and the same for every response. Rewards of the top two probabilities, of checks, of
judges and of lengths are not of this form.
"""

from __future__ import annotations

from typing import Literal

import torch


def cross_entropy(q: torch.Tensor, pi: torch.Tensor) -> torch.Tensor:
    """`H(q, pi)` of each row, `[I]` float64 nats, for `q`, `pi`: `[I, V]`; infinite where q has mass and pi has none,
    and 0 log 0 = 0."""
    q, pi = q.double(), pi.double()
    return -torch.where(q > 0, q * pi.log(), torch.zeros_like(q)).sum(-1)


def unified(
    q: torch.Tensor,
    pi: torch.Tensor,
    *,
    sigma: Literal[-1, 1],
    aggregation: Literal["mean", "sum"] = "mean",
    psi: Literal["id", "exp"] = "id",
) -> float:
    """The reward of one response; `q`, `pi`: `[I, V]` distributions, a row for each place of I."""
    each = cross_entropy(q, pi)
    value = sigma * (each.mean() if aggregation == "mean" else each.sum())
    return float(value.exp() if psi == "exp" else value)
