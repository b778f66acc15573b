"""Which figures a report shows, and what is said under each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from .figures import (
    Caption,
    Panel,
    Picture,
    Styles,
    accuracy_panels,
    describe_curves,
    metric_drawer,
    proxy_panels,
    render,
)
from .runs import Series


@dataclass(frozen=True)
class Detail:
    """A metric of training that every report shows in a panel of its own."""

    name: str
    metric: str
    title: str
    subtitle: str
    share: bool
    caption: str


DETAILS = (
    Detail(
        "entropy", "policy/sampled_entropy", "Policy entropy", "nats per response token, from the sampled ones", False,
        "It falls in healthy and in collapsing runs alike.",
    ),
    Detail(
        "length", "response/length", "Response length", "mean tokens", False,
        "Degenerate answers shrink to a few tokens or grow to the limit.",
    ),
    Detail(
        "majority_ratio", "vote/majority_ratio", "Majority ratio", "share of votes for the winner", True,
        "Responses without an answer count in the denominator.",
    ),
    Detail(
        "no_answer", "response/no_answer", "Responses without an answer", "share of rollouts", True,
        "Nothing could be extracted from these.",
    ),
    Detail(
        "precision", "audit/vote/precision", "Vote precision", "right, given that the vote rewards it", True,
        "Zero when the vote rewards nothing: it shows a collapse to unparsable text.",
    ),
    Detail(
        "reward_accuracy", "audit/vote/reward_accuracy", "Reward accuracy", "vote reward equals true reward", True,
        "Read it with precision: when nothing parses both rewards are 0 everywhere, and it drifts to 1.",
    ),
)  # fmt: skip
"""In the order of the page."""


def report_pictures(
    series: Sequence[Series], sets: Sequence[str], styles: Styles, title: str
) -> tuple[Picture | None, list[Picture], list[Picture]]:
    """(the overview that tells the story, further wide figures, one small figure for each of DETAILS that was logged).

    The overview shows the accuracy on the first of `sets`, a panel a base, beside the label-free rewards.
    """
    overview = _overview(series, sets[0], styles, title) if sets else None
    others = [_accuracy(series, each, styles) for each in sets[1:]]
    others.append(_rewards(series, styles))
    details = [
        _detail(series, detail, styles) for detail in DETAILS if any(item.curves(detail.metric) for item in series)
    ]
    return overview, [picture for picture in others if picture], [picture for picture in details if picture]


def _overview(series: Sequence[Series], eval_set: str, styles: Styles, title: str) -> Picture | None:
    panels = accuracy_panels(series, eval_set, styles)
    if styles.grouped:  # a panel a reward would make it a wall of panels: they have a figure of their own
        alt = f"Line charts. {_accuracy_alt(series, eval_set)}"
        caption = Caption("overview", "Held-out accuracy", _accuracy_text(series), alt)
        return render(caption, panels, columns=2, heading=title)
    panels += proxy_panels(series, styles, unsupervised_only=True)
    alt = f"Line charts. {_accuracy_alt(series, eval_set)}. Reward: {_metric_alt(series, 'reward/proxy')}"
    text = f"{_accuracy_text(series)} Each reward has its own unit, and so its own axis."
    return render(Caption("overview", "Held-out accuracy and proxy reward", text, alt), panels, heading=title)


def _accuracy(series: Sequence[Series], eval_set: str, styles: Styles) -> Picture | None:
    alt = f"Line charts. {_accuracy_alt(series, eval_set)}"
    caption = Caption(f"accuracy_{eval_set}", f"Accuracy on {eval_set}", _accuracy_text(series), alt)
    return render(caption, accuracy_panels(series, eval_set, styles))


def _rewards(series: Sequence[Series], styles: Styles) -> Picture | None:
    alt = f"Line charts: {_metric_alt(series, 'reward/proxy')}"
    text = "What the policy is trained on. Rewards have different units, so each has an axis of its own."
    return render(Caption("rewards", "Rewards", text, alt), proxy_panels(series, styles))


def _detail(series: Sequence[Series], detail: Detail, styles: Styles) -> Picture | None:
    """One panel; in a study of several bases by several settings one for each base."""
    parts = {detail.title: list(series)}
    if styles.grouped:
        bases = dict.fromkeys(item.base for item in series)
        parts = {f"{detail.title}, {base}": [item for item in series if item.base == base] for base in bases}
    panels = [
        Panel(title, detail.subtitle, metric_drawer(members, detail.metric, styles), detail.share)
        for title, members in parts.items()
    ]
    alt = f"Line chart: {_metric_alt(series, detail.metric)}"
    return render(Caption(detail.name, detail.title, detail.caption, alt), panels, columns=2)


def _accuracy_text(series: Sequence[Series]) -> str:
    lines = "bands: one standard error over problems"
    if any(len(item.runs) > 1 for item in series):
        lines = "thick: mean over seeds, thin: each seed"
    return f"Dashed and dotted: what the untrained base scores by maj@n and by greedy decoding; {lines}."


def _accuracy_alt(series: Sequence[Series], eval_set: str) -> str:
    return "Accuracy: " + describe_curves(series, partial(Series.accuracy_metric, eval_set=eval_set))


def _metric_alt(series: Sequence[Series], metric: str) -> str:
    def when_logged(item: Series) -> str | None:
        return metric if item.curves(metric) else None

    return describe_curves(series, when_logged)
