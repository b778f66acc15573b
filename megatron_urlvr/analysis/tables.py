"""The report's tables and sentences, as plain values for its template."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from .curves import COLLAPSED, ends
from .figures import Styles, base_scores
from .peaks import PeakStatistics, load_problem_accuracy, peak_statistics
from .pictures import DETAILS
from .runs import RunRecord, Series, differing_settings, reward_text

LONGEST_SAMPLE = 1500
"""Characters of a response that the page shows."""
GLANCE = 60
"""The answer of a response of at most so many characters is not repeated beside it."""
SOLVED = 0.9
"""A run ends solved above this accuracy."""


def labelled(series: Iterable[Series]) -> list[tuple[str, RunRecord]]:
    """Every run with its name in tables: the series' label, and the seed where it has replicates."""
    return [
        (item.label if len(item.runs) == 1 else f"{item.label}, seed {run.seed}", run)
        for item in series
        for run in item.runs
    ]


def base_sentences(series: Sequence[Series], sets: Sequence[str]) -> list[str]:
    """What each base scores before any training, and what that means for reading the curves."""
    out = []
    for base in dict.fromkeys(item.base for item in series):
        members = [item for item in series if item.base == base]
        for each in sets[:1]:
            scores = base_scores(members, each)
            if not scores:
                continue
            named = ", ".join(f"{name} {value:.3f}" for name, value in sorted(scores.items(), reverse=True))
            text = f"Before any training, base {base} scores on {each}: {named}."
            if "greedy" in scores:
                text += (
                    f" Greedy decoding alone gives {scores['greedy']:.3f}:"
                    " a gain of sampled accuracy up to there is also to be had at temperature 0, without training."
                )
            out.append(text)
    return out


def finding(item: Series, eval_set: str | None) -> str:
    """What happened to a series, in a sentence or two."""
    summaries = [summary for run in item.runs if eval_set and (summary := run.summary(eval_set))]
    proxies = [found for run in item.runs if (found := run.ends_of("reward/proxy"))]
    if not summaries:
        text = "not evaluated."
    elif len(item.runs) == 1:
        only = summaries[0]
        text = (
            f"{only.verdict}. Accuracy {only.start:.2f} at the start, {only.peak:.2f} at its peak (step"
            f" {only.peak_step}), {only.end:.2f} at the end (step {only.end_step})."
        )
    else:
        counts = Counter(summary.verdict for summary in summaries)
        verdicts = ", ".join(f"{verdict} in {count} of {len(summaries)}" for verdict, count in counts.most_common())
        start, end = (
            sum(values) / len(summaries) for values in zip(*((s.start, s.end) for s in summaries), strict=True)
        )
        text = f"{verdicts}. Mean accuracy {start:.2f} at the start, {end:.2f} at the end."
    what = "reward" if item.supervised else "proxy reward"
    if len(proxies) == 1:
        start, end = proxies[0]
        text += f" The {what} {'rose' if end > start else 'fell'} from {start:.3g} to {end:.3g}."
    elif proxies:
        text += f" The {what} rose in {sum(end > start for start, end in proxies)} of {len(proxies)}."
    return text + _alarms(item)


def _alarms(item: Series) -> str:
    """Where the label-free collapse detector raised its alarm; empty where it did not."""
    steps = [next((row["step"] for row in run.rows if row.get("collapse/alarm") == 1), None) for run in item.runs]
    if not any(step is not None for step in steps):
        return ""
    if len(steps) == 1:
        return f" The label-free detector raised its alarm at step {steps[0]}."
    return f" The label-free detector raised its alarm in {sum(step is not None for step in steps)} of {len(steps)}."


def accuracy_table(series: Sequence[Series], eval_set: str | None, styles: Styles) -> dict[str, Any]:
    """Start, peak and end of every run on one set."""
    rows, maj_names = [], set()
    for item in series:
        for label, run in labelled([item]):
            summary = run.summary(eval_set) if eval_set else None
            bases = run.base_lines(eval_set) if eval_set else {}
            maj = next((name for name in bases if name.startswith("maj@")), None)
            maj_names |= {maj} if maj else set()
            proxy = run.ends_of("reward/proxy") or (None, None)
            rows.append(
                {
                    "label": label,
                    "colour": styles.colour(item),
                    "base": item.base,
                    "reward": reward_text(run.config),
                    "supervised": bool(run.supervised),
                    "start": summary and summary.start,
                    "peak": summary and summary.peak,
                    "peak_step": summary.peak_step if summary else None,
                    "end": summary and summary.end,
                    "greedy": bases.get("greedy"),
                    "maj": bases.get(maj) if maj else None,
                    "proxy_start": proxy[0],
                    "proxy_end": proxy[1],
                    "verdict": summary.verdict if summary else "not evaluated",
                    "state": run.state,
                }
            )
    metric = next((name for item in series if eval_set and (name := item.accuracy_metric(eval_set))), None)
    caption = (
        f"Sampled accuracy, {metric.rsplit('/', 1)[1]} on {eval_set}" if metric else "No held-out set was evaluated"
    )
    return {"caption": caption, "maj": maj_names.pop() if len(maj_names) == 1 else "maj@n", "rows": rows}


def peak_table(
    series: Sequence[Series], select: str | None, measure: str | None, styles: Styles
) -> dict[str, Any] | None:
    """The table of peaks chosen on one set and measured on the other, and its counts over seeds; None without them."""
    if select is None or measure is None:
        return None
    rows, counts = [], []
    for item in series:
        found: list[PeakStatistics] = []
        for label, run in labelled([item]):
            chosen, measured = load_problem_accuracy(run.path, select), load_problem_accuracy(run.path, measure)
            if chosen is not None and measured is not None:
                found.append(peak_statistics(chosen, measured, seed=run.seed or 0))
                rows.append({"label": label, "colour": styles.colour(item), "peak": found[-1]})
        if found:
            counts.append(f"{item.label}: {_peak_counts(item, found)}")
    if not rows:
        return None
    first: PeakStatistics = rows[0]["peak"]  # type: ignore[assignment]
    return {
        "select_set": select,
        "measure_set": measure,
        "problems": first.problems,
        "resamples": f"{first.resamples:,}",
        "rows": rows,
        "counts": counts,
    }


def _peak_counts(item: Series, found: Sequence[PeakStatistics]) -> str:
    total = len(found)
    parts = [
        f"the lower bound of peak − start is above 0 in {sum(peak.low > 0 for peak in found)} of {total}",
        f"the end is below {COLLAPSED} in {sum(peak.end < COLLAPSED for peak in found)} and above {SOLVED} in"
        f" {sum(peak.end > SOLVED for peak in found)} of {total}",
    ]
    proxies = [ends(curve) for curve in item.curves("reward/proxy")]
    if proxies:
        parts.append(f"the reward it trains on rises in {sum(end > start for start, end in proxies)} of {len(proxies)}")
    return "; ".join(parts) + "."


def probe_samples(item: Series, eval_set: str | None, styles: Styles) -> dict[str, Any] | None:
    """Probe samples of the series' first run that kept any, at start, peak and end."""
    for label, run in labelled([item]):
        steps = run.sample_steps
        if not steps:
            continue
        summary = run.summary(eval_set) if eval_set else None
        wanted = {"start": steps[0], "end": steps[-1]}
        if summary is not None:
            wanted = {"start": steps[0], "peak": _nearest(steps, summary.peak_step), "end": steps[-1]}
        kept = {step: _by_prompt(run.samples(step)) for step in dict.fromkeys(wanted.values())}
        names = {step: " and ".join(name for name, at in wanted.items() if at == step) for step in kept}
        prompts = dict.fromkeys(prompt for samples in kept.values() for prompt in samples)
        rows = [{"prompt": _clip(p), "cells": [samples.get(p, []) for samples in kept.values()]} for p in prompts]
        columns = [f"{names[step]} (step {step})" for step in kept]
        return {"label": label, "colour": styles.colour(item), "columns": columns, "rows": rows}
    return None


def _nearest(steps: Sequence[int], step: int) -> int:
    return min(steps, key=lambda each: abs(each - step))


def _by_prompt(samples: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, str]]]:
    out: dict[str, list[dict[str, str]]] = {}
    for sample in samples:
        text = str(sample.get("response", ""))
        cell = {"response": _clip(text) if text else "(empty)", "meta": _meta(sample, len(text))}
        out.setdefault(str(sample.get("prompt", "")), []).append(cell)
    return out


def _meta(sample: dict[str, Any], length: int) -> str:
    """Whether a response is right, and its reward; its answer too where that is not seen at a glance."""
    parts = []
    if sample.get("answer") is None:
        parts.append("no answer")
    elif length > GLANCE:
        parts.append(f"answer {sample['answer']}")
    correct = sample.get("correct")
    parts.append("not graded" if correct is None else "right" if correct else "wrong")
    if isinstance(reward := sample.get("reward"), int | float):
        parts.append(f"reward {reward:.3g}")
    return " · ".join(parts)


def _clip(text: str) -> str:
    cut = len(text) - LONGEST_SAMPLE
    return text if cut <= 0 else f"{text[:LONGEST_SAMPLE]} … ({cut} more characters)"


def label_row(label: str, run: RunRecord) -> dict[str, str]:
    training = {True: "supervised", False: "label-free", None: "not recorded"}[run.supervised]
    uses = run.labels.get("uses", {})
    text = ", ".join(f"{use}: {count:,}" for use, count in sorted(uses.items())) or "none recorded"
    return {"label": label, "training": training, "uses": text}


def setting_table(series: Sequence[Series]) -> dict[str, Any]:
    """Settings that differ between series (their first runs), and how replicates differ."""
    firsts = [item.runs[0] for item in series]
    replicated = [item for item in series if len(item.runs) > 1]
    rows = differing_settings(firsts)
    text = ""
    if replicated:
        seeds = sorted({run.seed for item in replicated for run in item.runs if run.seed is not None})
        text = f"Seeds {', '.join(map(str, seeds))} replicate each setting; the table shows the first of each."
    shown = [(key, ["–" if value is None else str(value) for value in values]) for key, values in rows.items()]
    return {"labels": [item.label for item in series], "rows": shown, "replicates": text}


def missing(series: Sequence[Series], sets: Sequence[str]) -> list[str]:
    """What a full report would show and these runs do not have."""
    out = []
    wanted = ["reward/proxy", *(detail.metric for detail in DETAILS)]
    for label, run in labelled(series):
        metrics = set(run.metrics)
        absent = [metric for metric in wanted if metric not in metrics]
        absent += [f"eval/{each}/avg@n" for each in sets if run.accuracy_metric(each) is None]
        absent += [f"eval/{each}/base/*" for each in sets if not run.base_lines(each)]
        if not sets:
            absent.append("any evaluation")
        if absent:
            out.append(f"{label}: no value of {', '.join(absent)} was logged.")
        if not run.sample_steps:
            out.append(f"{label}: no probe samples were kept.")
        if not run.labels:
            out.append(f"{label}: labels.json, the record of label use, is not there.")
    return out


def file_row(label: str, run: RunRecord) -> dict[str, str]:
    folder = run.path / "checkpoints"
    kept = sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
    return {"label": label, "path": str(run.path.resolve()), "checkpoints": ", ".join(kept) or "none"}
