"""Questions from a file, through a template, to a graded and audited step."""

from __future__ import annotations

import json
import re
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import TRAIN, Command, rows, status, write_config
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_urlvr.config.pretrain import ArchitectureSection
from megatron_urlvr.data.grading.pool import MathPool
from megatron_urlvr.data.grading.text import TextGrader
from megatron_urlvr.data.tokenizer import character_tokenizer, save_tokenizer
from megatron_urlvr.pretrain import qwen2_config
from megatron_urlvr.rollout.records import group_from_record, read_records
from megatron_urlvr.types import Group, Sample

ALPHABET = string.digits + string.ascii_letters + " +-*/=?!.,:<>|_\n$"
CHAT = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
QUESTIONS = [
    {"name": "a", "question": "2+3=?", "solution": 5},
    {"name": "b", "question": "What is 12-4 ?", "solution": "8"},
    {"name": "c", "question": "1+1+1+1+1+1+1", "solution": " 07 "},
    {"name": "d", "question": "Say anything.", "solution": None},
]


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that has learned nothing, with a tokenizer of letters and a chat template."""
    folder = tmp_path_factory.mktemp("talker")
    tokenizer = character_tokenizer(ALPHABET, eos="$")
    tokenizer.chat_template = CHAT
    save_tokenizer(tokenizer, folder)
    architecture = ArchitectureSection(layers=1, hidden=32, ffn=32, heads=2, kv_heads=1, init_std=0.3)
    settings = qwen2_config(architecture, len(tokenizer), 128)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**settings))
    with torch.no_grad():  # digits are likely, so that answers are to be found
        model.lm_head.weight[:10] += 0.2
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def train(urlvr: Command, talker: Path, tmp_path: Path):
    """`train(template="chat")` takes one step on QUESTIONS; returns its metrics and groups."""

    def _train(*overrides: str, **source: Any) -> tuple[dict[str, Any], list[Group]]:
        data = tmp_path / "questions.jsonl"
        data.write_text("\n".join(json.dumps(row) for row in QUESTIONS) + "\n")
        known = {"prompt_field": "question", "label_field": "solution", "id_field": "name"}
        grading = {"extract": "regex", "pattern": r"(\d)", "equivalence": "exact"}
        questions = {"path": str(data), **known, "grading": grading, **source}
        file = write_config(
            tmp_path / "jsonl.yaml",
            TRAIN,
            run={"dir": str(tmp_path / "run"), "steps": 1},
            model={"path": str(talker)},
            data={"max_prompt_tokens": 100, "train": questions},
            eval={"every": 1, "sets": {"test": {**questions, "samples": 2, "limit": 3}}},
            rollout={"prompts": 4, "n_votes": 8, "record": True},
        )
        outcome = urlvr("train", file, *overrides)
        assert outcome.code == 0, outcome
        assert status(tmp_path / "run")["state"] == "done"
        record = read_records(tmp_path / "run/rollouts/step_000001.jsonl.zst")
        groups = sorted((group_from_record(group) for group in record), key=lambda group: group.prompt.id)
        assert [group.prompt.id for group in groups] == ["train/a", "train/b", "train/c", "train/d"]
        return rows(tmp_path / "run")[1], groups

    return _train


def test_a_chat_template_frames_the_question(train):
    _, groups = train(template="chat", system="Be brief.")
    assert [group.prompt.text for group in groups] == [
        f"<system>Be brief.\n<user>{row['question']}\n<assistant>" for row in QUESTIONS
    ]
    for group in groups:
        assert len(group.prompt.tokens) == len(group.prompt.text)


def test_a_plain_template_frames_the_question(train):
    _, groups = train(template="plain", plain_template="Q: {prompt}\nA: ")
    assert [group.prompt.text for group in groups] == [f"Q: {row['question']}\nA: " for row in QUESTIONS]


def by_hand(sample: Sample) -> str | None:
    """The last digit; one at the very end of a response that was cut off may be the beginning of a longer number."""
    found = list(re.finditer(r"\d", sample.text))
    if found and sample.finish == "length" and found[-1].end() == len(sample.text):
        found.pop()
    return found[-1].group() if found else None


def test_answers_are_found_graded_and_audited_as_by_hand(train):
    metrics, groups = train()
    truth = {"train/a": "5", "train/b": "8", "train/c": "7"}
    right = []
    for group in groups:
        assert group.answers == [by_hand(sample) for sample in group.samples]
        if group.prompt.id in truth:
            right += [answer == truth[group.prompt.id] for answer in group.answers]
    assert metrics["audit/accuracy"] == pytest.approx(sum(right) / 24)
    assert sum(right) > 0
    assert metrics["audit/no_label"] == 0.25
    unparsed = [sample.answer is None for group in groups for sample in group.samples]
    assert metrics["response/no_answer"] == pytest.approx(sum(unparsed) / 32)
    assert 0 < sum(unparsed) < 32


def test_prompts_of_different_lengths_are_sampled_and_scored_alike(train):
    """The engine pads on the left, the policy packs; both must see the same log-probs."""
    metrics, groups = train()
    assert len({len(group.prompt.tokens) for group in groups}) > 1
    summed = [float(sample.logp.double().sum()) for group in groups for sample in group.samples]
    assert metrics["reward/proxy"] == pytest.approx(sum(summed) / 32, rel=1e-5)
    for group in groups:
        for sample in group.samples:
            torch.testing.assert_close(sample.stats.logp, sample.logp, rtol=1e-4, atol=1e-4)


def test_comparisons_without_a_verdict_are_counted_in_the_metrics(train, monkeypatch):
    """Every answer is a formula of its own, which math-verify would be asked about; it crashes on those with a 1."""
    asked, ask = [], TextGrader._ask
    monkeypatch.setattr(TextGrader, "_ask", lambda self, a, b: asked.append((a, b)) or ask(self, a, b))
    monkeypatch.setattr(MathPool, "compare", lambda self, a, b: "crash" if "1" in a + b else "different")
    formula = {"extract": "regex", "pattern": r"(\d\D)", "equivalence": "math"}
    metrics, _ = train("eval.every=0", grading=formula)
    crashes = sum("1" in a + b for a, b in asked)
    assert 0 < crashes < len(asked)
    assert (metrics["grading/asked"], metrics["grading/crashes"]) == (len(asked), crashes)
    assert [metrics[f"grading/{name}"] for name in ("timeouts", "errors", "too_long")] == [0, 0, 0]
