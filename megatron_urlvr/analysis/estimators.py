"""Estimators of how good a policy is, from graded samples of a held-out set, and their standard errors.

Arrays hold one row a problem and one column a sample: `correct: [P, n]` bool, `classes: [P, n]` int with the
equivalence class of each answer and -1 where none was parsed. Estimators return one value for each problem, `[P]`
float64, unless they say otherwise; `mean_and_se` turns these into a number with an error.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_urlvr.algorithms.ranking import auroc

__all__ = [
    "auroc",
    "avg_at_n",
    "balanced_accuracy",
    "maj_at_k",
    "maj_at_n",
    "mean_and_se",
    "parse_rate",
    "pass_at_k",
    "ratio_and_se",
    "summarise",
]

NO_ANSWER = -1
MAJ_SUBSETS = 200
"""Random subsets that maj@k averages over."""
Floats = NDArray[np.float64]


def avg_at_n(correct: ArrayLike) -> Floats:
    """Share of right samples of each problem."""
    return _table("correct", correct).astype(bool).mean(axis=1, dtype=np.float64)


def maj_at_n(classes: ArrayLike, correct: ArrayLike) -> Floats:
    """Whether the most frequent answer of each problem is right; of k tied ones each counts 1/k.

    Unparsable samples do not vote; a problem without any answer is wrong. The members of a class are right together;
    where a grader calls only some of them right, the class counts by their share.
    """
    ids, right = _table("classes", classes), _table("correct", correct).astype(bool)
    _same_shape(ids, right)
    return np.array([_majority_right(*row) for row in zip(ids, right, strict=True)])


def _majority_right(ids: NDArray[np.generic], right: NDArray[np.bool_]) -> float:
    voted = ids != NO_ANSWER
    if not voted.any():
        return 0.0
    _, member_of, sizes = np.unique(ids[voted], return_inverse=True, return_counts=True)
    # tied classes are equally large, so that the mean over their members is the mean over the classes
    return float(right[voted][sizes[member_of] == sizes.max()].mean())


def maj_at_k(classes: ArrayLike, correct: ArrayLike, k: int, *, subsets: int = MAJ_SUBSETS, seed: int = 0) -> Floats:
    """`maj_at_n` of k of the n samples, averaged over random subsets without replacement, `[P]`.

    ValueError unless 1 <= k <= n / 2: larger subsets of the same n samples share most of their members, so that their
    average says little of what k fresh samples would vote. With k = n it is one vote, `maj_at_n`.
    """
    ids, right = _table("classes", classes), _table("correct", correct).astype(bool)
    _same_shape(ids, right)
    n = ids.shape[1]
    if not (k >= 1 and 2 * k <= n):
        raise ValueError(f"maj@{k} needs at least {2 * k} samples a problem, and there are {n}")
    rng = np.random.default_rng(seed)
    total = np.zeros(len(ids))
    for _ in range(subsets):
        chosen = rng.permutation(n)[:k]
        total += maj_at_n(ids[:, chosen], right[:, chosen])
    return total / subsets


def pass_at_k(correct: ArrayLike, k: int) -> Floats:
    """Chance that one of k samples is right, without bias from n > k samples: `1 - C(n - c, k) / C(n, k)`
    (Chen et al., arXiv 2107.03374, eq. 1), as a product. ValueError unless 1 <= k <= n."""
    right = _table("correct", correct).astype(bool)
    n = right.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} cannot be estimated from {n} samples a problem: 1 <= k <= {n} is needed")
    wrong = n - right.sum(axis=1)
    missed = np.ones(len(right))
    for drawn in range(k):
        missed *= np.maximum(wrong - drawn, 0) / (n - drawn)
    return 1.0 - missed


def parse_rate(classes: ArrayLike) -> Floats:
    """Share of samples of each problem from which an answer could be parsed."""
    return (_table("classes", classes) != NO_ANSWER).mean(axis=1, dtype=np.float64)


def balanced_accuracy(said: Sequence[bool | None], right: Sequence[bool]) -> float | None:
    """Mean of two shares: right cases that `said` calls right, wrong ones that it calls wrong; None says neither.

    Saying the same of everything makes 0.5. None where no case is right, or none is wrong.
    """
    shares = [
        float(np.mean([verdict is truth for verdict, real in zip(said, right, strict=True) if real is truth]))
        for truth in (True, False)
        if truth in right
    ]
    return sum(shares) / 2 if len(shares) == 2 else None


def mean_and_se(values: ArrayLike, *, seed: int, resamples: int = 1000) -> tuple[float, float]:
    """Mean over problems, and its standard error from resampling problems. `values: [P]`."""
    x = np.asarray(values, dtype=np.float64)
    mean, se = ratio_and_se(x, np.ones_like(x), seed=seed, resamples=resamples)
    return (0.0 if mean is None else mean), se


def ratio_and_se(
    numerator: ArrayLike, denominator: ArrayLike, *, seed: int, resamples: int = 1000
) -> tuple[float | None, float]:
    """`sum(numerator) / sum(denominator)` over problems, and its standard error from resampling problems: the standard
    deviation over `resamples` draws of P problems with replacement.

    None for the ratio when the denominator's sum is 0; draws in which it is are left out. Samples of one problem are
    not independent of each other, problems are: that is why they are what is drawn. The draws depend on `seed` and P
    alone, so that two metrics of one set, or two policies on it, are resampled together.
    """
    top, bottom = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    if top.ndim != 1 or top.shape != bottom.shape or not len(top):
        raise ValueError(f"one value a problem is needed, and at least one problem: got {top.shape} and {bottom.shape}")
    if bottom.sum() == 0:
        return None, 0.0
    drawn = _draws(len(top), seed, resamples)
    tops, bottoms = drawn @ top, drawn @ bottom
    kept = bottoms > 0
    return float(top.sum() / bottom.sum()), float((tops[kept] / bottoms[kept]).std())


def summarise(
    correct: ArrayLike, classes: ArrayLike, *, pass_k: Sequence[int] = (), maj_k: Sequence[int] = (), seed: int = 0
) -> dict[str, float]:
    """All metrics of one held-out set by name, with standard errors under `<name>_se`: `avg@n`, `maj@n`, `pass@k` for
    each of `pass_k`, `maj@k` for each of `maj_k`, `parse_rate`, and `accuracy_given_parsed` (right samples of the
    parsable ones; left out when nothing is parsable)."""
    right, ids = _table("correct", correct).astype(bool), _table("classes", classes)
    _same_shape(ids, right)
    n = right.shape[1]
    per_problem = {f"avg@{n}": avg_at_n(right), f"maj@{n}": maj_at_n(ids, right)}
    per_problem |= {f"pass@{k}": pass_at_k(right, k) for k in pass_k}
    per_problem |= {f"maj@{k}": maj_at_k(ids, right, k) for k in maj_k}
    per_problem |= {"parse_rate": parse_rate(ids)}
    out: dict[str, float] = {}
    for name, values in per_problem.items():
        out[name], out[f"{name}_se"] = mean_and_se(values, seed=seed)
    parsed = ids != NO_ANSWER
    ratio, se = ratio_and_se((right & parsed).sum(axis=1), parsed.sum(axis=1), seed=seed)
    if ratio is not None:
        out |= {"accuracy_given_parsed": ratio, "accuracy_given_parsed_se": se}
    return out


def _draws(problems: int, seed: int, resamples: int) -> Floats:
    """How often each problem is in each resample, `[resamples, P]`."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(problems, np.full(problems, 1.0 / problems), size=resamples).astype(np.float64)


def _table(name: str, values: ArrayLike) -> NDArray[np.generic]:
    table = np.asarray(values)
    if table.ndim != 2 or 0 in table.shape:
        raise ValueError(f"{name} has shape {table.shape}; [problems, samples] is needed, with at least one of each")
    return table


def _same_shape(classes: NDArray[np.generic], correct: NDArray[np.bool_]) -> None:
    if classes.shape != correct.shape:
        raise ValueError(f"classes are {classes.shape} and correct is {correct.shape}; one of each a sample is needed")
