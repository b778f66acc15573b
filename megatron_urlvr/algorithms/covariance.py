"""Which tokens KL-Cov holds: those in which log-probability and advantage vary together most.

Entropy falls by about the covariance of log-probability and advantage times the step (arXiv 2505.22617, eq. 7), and few
tokens carry it. `c_t = (log p_t - mean log p) (A_t - mean A)`, with the means over all response tokens of the
mini-batch; the share of tokens with the largest c_t is held.

Global totals: the number of tokens, the sums of log p and A, and the k-th largest c_t of all replicas. Public code
takes means and top-k of each micro-batch, so that what is held depends on how a batch is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .advantages import Total, alone

Gather = Callable[[list[float]], Sequence[Sequence[float]]]
"""Every replica's list of numbers; collective."""


def held_tokens(
    logp: torch.Tensor,
    advantage: torch.Tensor,
    share: float,
    *,
    total: Total = alone,
    gather: Gather = lambda values: [values],
) -> torch.Tensor:
    """1 on this replica's tokens that are held, else 0: `[R]` float32.

    `logp` before the first update and `advantage`: `[R]` each. At least one token of the mini-batch is held; all that
    tie with the last one are.
    """
    logp, advantage = logp.detach().cpu().double(), advantage.detach().cpu().double()
    count, *sums = total(
        torch.stack([torch.tensor(float(len(logp)), dtype=torch.float64), logp.sum(), advantage.sum()])
    )
    if float(count) == 0:
        return torch.zeros(0)
    covariance = (logp - sums[0] / count) * (advantage - sums[1] / count)
    wanted = max(1, int(share * float(count)))
    mine = covariance.topk(min(wanted, len(covariance))).values.tolist()
    largest = sorted((value for values in gather(mine) for value in values), reverse=True)
    return (covariance >= largest[wanted - 1]).float()
