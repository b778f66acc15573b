"""Signals across prompts against counting every pair by hand."""

from __future__ import annotations

import itertools
import random

import pytest

from megatron_urlvr.monitor.audit import rates
from megatron_urlvr.monitor.collapse_signals import (
    NGRAM,
    MajorityMemory,
    across_prompts,
    group_answers,
    repetition_sums,
)
from megatron_urlvr.types import Group, Prompt, Sample


def group(prompt: str, answers: list[str | None], tokens: list[list[int]] | None = None) -> Group:
    """A graded group; equal answers are equivalent."""
    tokens = tokens or [[1, 2]] * len(answers)
    samples = [Sample(prompt, i, tokens[i], "", "stop", answer=answer) for i, answer in enumerate(answers)]
    classes = [None if answer is None else answers.index(answer) for answer in answers]
    return Group(Prompt(prompt, prompt, (0,)), samples, classes)


def test_agreement_across_prompts_is_the_share_of_equal_pairs_of_different_prompts():
    draw = random.Random(0)
    for _ in range(50):
        ids = [draw.choice("abcd") for _ in range(5)]  # a prompt may be in a batch twice
        groups = [group(p, [draw.choice(["1", "2", "3", None]) for _ in range(draw.randint(1, 5))]) for p in ids]
        parsed = [(g.prompt.id, s.answer) for g in groups for s in g.samples if s.answer is not None]
        pairs = [x[1] == y[1] for x, y in itertools.combinations(parsed, 2) if x[0] != y[0]]
        expected = sum(pairs) / len(pairs) if pairs else None
        assert across_prompts(group_answers(groups)) == pytest.approx(expected)


def test_one_prompt_says_nothing_about_agreement_across_prompts():
    assert across_prompts(group_answers([group("a", ["1", "1"]), group("a", ["1", None])])) is None
    assert across_prompts(group_answers([group("a", ["1"]), group("b", [None])])) is None


def test_equivalent_answers_count_under_the_first_of_their_group():
    one = group("a", ["0.5", "1/2"])
    one.classes = [0, 0]
    assert list(group_answers([one])[0]["counts"].values()) == [2]


def test_flips_are_counted_among_the_prompts_met_before_alone():
    memory = MajorityMemory()
    assert memory.flip_rate(group_answers([group("a", ["1", "1", "2"]), group("b", ["3"])])) is None
    later = [group("a", ["2", "2", "1"]), group("b", ["3"]), group("c", ["9"]), group("d", [None])]
    assert memory.flip_rate(group_answers(later)) == 0.5
    restored = MajorityMemory(memory.state)
    assert restored.flip_rate(group_answers([group("a", ["2"])])) == 0.0
    assert restored.flip_rate(group_answers([group("a", [None])])) is None


def test_repetition_is_the_share_of_ngrams_that_stood_there_before():
    draw = random.Random(1)
    tokens = [[draw.randint(0, 2) for _ in range(draw.randint(0, 40))] for _ in range(20)]
    seen_before = total = 0
    for sequence in tokens:
        seen = set()
        for start in range(len(sequence) - NGRAM + 1):
            gram = tuple(sequence[start : start + NGRAM])
            seen_before += gram in seen
            total += 1
            seen.add(gram)
    found = rates(repetition_sums([group("a", ["1"] * 20, tokens)]))
    assert found == {"response/repetition": pytest.approx(seen_before / total)}
    assert rates(repetition_sums([group("a", ["1"], [[5] * 3])])) == {}  # too short to repeat anything
