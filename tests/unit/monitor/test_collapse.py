"""The detector on made-up rows: what raises the alarm, what never does, and that its state is all there is to it."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from megatron_urlvr.config.monitor import CollapseSection
from megatron_urlvr.monitor.collapse import CHANGE, SIGNALS, CollapseDetector, replay

NORMAL = {
    "answers/across_prompts": 0.1,
    "response/no_answer": 0.03,
    "response/truncated": 0.01,
    "response/repetition": 0.02,
    "response/length": 8.0,
    "policy/sampled_entropy": 0.8,
    "vote/majority_ratio": 0.3,
    "answers/unique": 7.0,
    "reward/zero_variance": 0.0,
}
SHARP = {
    "policy/sampled_entropy": 0.05,
    "vote/majority_ratio": 0.98,
    "answers/unique": 1.1,
    "reward/zero_variance": 0.9,
    "kl/start": 0.4,
    "vote/flip_rate": 0.0,
}


def rows(end: dict[str, float], *, start: int = 20, over: int = 10, steps: int = 60, seed: int = 0) -> list[Any]:
    """Noisy rows that are normal, and go over to `end` from `start` on."""
    draw = random.Random(seed)
    out = []
    for step in range(1, steps + 1):
        share = min(max((step - start) / over, 0.0), 1.0)
        row: dict[str, Any] = {"step": step}
        for name in {**NORMAL, **end}:
            normal = NORMAL.get(name, 0.0)
            row[name] = normal + share * (end.get(name, normal) - normal) + draw.gauss(0, 0.05 * max(normal, 0.05))
        out.append(row)
    return out


@pytest.mark.parametrize(
    ("metric", "end", "words"),
    [
        ("answers/across_prompts", 1.0, "the chance that two prompts get the same answer"),
        ("response/no_answer", 1.0, "the share of responses without an answer"),
        ("response/truncated", 1.0, "the share of responses cut off"),
        ("response/repetition", 0.9, "the share of repeated n-grams"),
    ],
)
def test_each_sign_of_degeneration_raises_the_alarm_and_is_named(metric, end, words):
    verdicts = replay(rows({metric: end}), CollapseSection())
    last = verdicts[-1]
    assert last.state == "collapsing"
    assert last.alarm is not None
    assert last.onset is not None
    assert 20 < last.onset < last.alarm <= 34
    assert last.reasons[0].startswith(words)
    assert f"collapse since step {last.onset}" in last.text
    assert all(verdict.alarm is None for verdict in verdicts[:20])


@pytest.mark.parametrize("seed", range(20))
def test_sharpening_alone_is_healthy(seed):
    verdicts = replay(rows(SHARP, start=6, over=40, seed=seed), CollapseSection())
    assert {verdict.state for verdict in verdicts} == {"learning", "healthy"}


@pytest.mark.parametrize("length", [2.0, 30.0])
def test_another_length_alone_is_healthy(length):
    """As of a policy that learns to leave out attempts that lead nowhere."""
    assert replay(rows({"response/length": length, **SHARP}, over=40), CollapseSection())[-1].alarm is None


def test_sharpening_makes_a_sign_of_degeneration_count_earlier():
    slow = {"answers/across_prompts": 0.5}
    alone = replay(rows(slow, over=40), CollapseSection())[-1]
    with_it = replay(rows({**slow, **SHARP}, over=40), CollapseSection())[-1]
    assert alone.alarm is not None
    assert with_it.alarm is not None
    assert with_it.alarm < alone.alarm


def test_far_from_the_start_without_more_agreement_is_degeneration():
    far = {"kl/start": 0.3}
    assert replay(rows(far), CollapseSection())[-1].alarm is not None
    agreeing = replay(rows({**far, "vote/majority_ratio": 0.6}), CollapseSection())[-1]
    assert agreeing.alarm is None


def test_the_onset_is_dated_back_to_where_the_score_rose():
    data = rows({"response/truncated": 0.6}, over=30)
    last = replay(data, CollapseSection())[-1]
    scores = {verdict.step: verdict.score for verdict in replay(data, CollapseSection())}
    assert last.onset is not None
    assert last.alarm is not None
    first = last.alarm - CollapseSection().patience + 1
    assert scores[first - 1] < 1 <= scores[first]
    assert last.onset == max(
        first - 6, min(s for s in range(1, first) if all(scores[k] >= 0.5 for k in range(s, first)))
    )


def test_a_single_odd_step_is_waited_out():
    data = rows({})
    data[30] |= {"response/no_answer": 1.0, "response/truncated": 1.0}
    assert replay(data, CollapseSection())[-1].alarm is None
    assert replay(data, CollapseSection(window=1, patience=1))[-1].alarm == 31


def test_a_noisy_baseline_widens_the_limit():
    data = rows({})
    for row, value in zip(data, [0.0, 0.2, 0.1, 0.3, 0.05], strict=False):
        row["response/truncated"] = value
    for row in data[20:]:
        row["response/truncated"] = 0.4  # beyond the least limit, within the noise of the first steps
    assert replay(data, CollapseSection())[-1].alarm is None
    assert replay(data, CollapseSection(deviations=0))[-1].alarm is not None


def test_error_that_stays_diverse_is_not_seen():
    """Another answer to every prompt, each of them wrong: the blind spot that docs/collapse.md states."""
    assert replay(rows({**SHARP, "answers/across_prompts": 0.1}), CollapseSection())[-1].alarm is None


def test_missing_and_undefined_values_say_nothing():
    data = rows({"response/no_answer": 1.0})
    for row in data[25:]:
        row["answers/across_prompts"] = None  # nothing parses any more
        row["policy/sampled_entropy"] = float("nan")
    for row in data:
        del row["answers/unique"]
    assert replay(data, CollapseSection())[-1].state == "collapsing"
    assert replay([{"step": 0, "eval/held_out/avg@4": 0.3}], CollapseSection()) == []


def test_a_detector_continues_from_its_state_as_if_nothing_had_been():
    data = rows({"answers/across_prompts": 0.9, **SHARP})
    whole = replay(data, CollapseSection())
    for cut in (1, 4, 22, 25, 40):
        before, after = CollapseDetector(CollapseSection()), CollapseDetector(CollapseSection())
        first = [before.observe(row["step"], row) for row in data[:cut]]
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        assert first + [after.observe(row["step"], row) for row in data[cut:]] == whole
        assert after.state_dict() == _state_after(data)


def _state_after(data: list[Any]) -> dict[str, Any]:
    detector = CollapseDetector(CollapseSection())
    for row in data:
        detector.observe(row["step"], row)
    return detector.state_dict()


def test_no_signal_reads_labels():
    assert not [signal.metric for signal in SIGNALS if signal.metric.startswith(("audit/", "eval/"))]
    assert {signal.metric for signal in CHANGE} == {*SHARP, "response/length"}


def test_snapshots_that_do_not_reach_back_far_enough_are_refused():
    with pytest.raises(ValueError, match="reach 2 steps back, but the onset of a collapse may lie"):
        CollapseSection(action="rollback", snapshots=2)
