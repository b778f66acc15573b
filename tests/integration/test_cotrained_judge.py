"""A judge that is trained beside the policy: the policy's own verdicts, rewarded without labels."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from fake_models import DiceModel
from fake_sglang import FakeServer
from small_runs import assert_same_run, at_step, rows, send, weights

from megatron_urlvr.data.tokenizer import load_tokenizer
from megatron_urlvr.rollout.records import read_groups
from megatron_urlvr.rollout.replay import rollout_file
from megatron_urlvr.types import samples_of

JUDGE = {
    "name": "judge",
    "cotrain": "vote",
    "template": "{response}{question}",
    "verdict": "whole",
    "yes": "c",  # how the base begins two of its kinds of answers to the question
    "no": "#",
    "samples": 4,
    "temperature": 1.0,
    "max_new_tokens": 1,
}
TERMS = {"noise": {"name": "random"}, "judged": {"name": "self_verification", "weight": 0}, "main": None}


def setting(**changes: object) -> list[str]:
    judge = {name: value for name, value in {**JUDGE, **changes}.items() if value is not None}
    return [f"reward.terms={json.dumps(TERMS)}", f"reward.providers.judge={json.dumps(judge)}"]


def test_the_judge_learns_to_agree_with_the_vote_and_nothing_else_is_read(urlvr, config, tmp_path):
    """Of the first characters that the base writes, most are no verdict: they go."""
    more = ["run.steps=10", "checkpoint.every=0", "eval.every=0", "rollout.prompts=8"]
    assert urlvr("train", config, *more, *setting(), f"run.dir={tmp_path}/taught").code == 0
    assert urlvr("train", config, *more, *setting(cotrain=None), f"run.dir={tmp_path}/left").code == 0
    taught, left = rows(tmp_path / "taught")[1:], rows(tmp_path / "left")[1:]
    assert not any(name.startswith("lesson/") for row in left for name in row)
    first, last = taught[:3], taught[-3:]
    agreement = [sum(row["lesson/judge/reward"] for row in part) / 3 for part in (first, last)]
    unparsable = [sum(row["term/judged/unparsable"] for row in part) / 3 for part in (first, last, left[-3:])]
    assert agreement[1] > agreement[0] + 0.1
    assert unparsable[1] < min(unparsable[0], unparsable[2]) - 0.2
    uses = [json.loads((tmp_path / run / "labels.json").read_text()) for run in ("taught", "left")]
    assert uses[0] == uses[1]
    assert uses[0]["supervised"] is False


def test_a_run_goes_on_after_a_signal_and_is_replayed_as_if_it_had_sampled(urlvr, config, tmp_path, monkeypatch):
    more = ["run.steps=3", *setting()]
    assert urlvr("train", config, *more, "rollout.record=true", f"run.dir={tmp_path}/whole").code == 0
    with at_step(monkeypatch, 3, send(signal.SIGTERM)):
        assert urlvr("train", config, *more, "rollout.record=true").code == 75
    assert urlvr("train", config, *more, "rollout.record=true").code == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole", step=3)

    (group, *_) = read_groups(tmp_path / "whole" / "rollouts" / "step_000001.jsonl.zst")
    assert [each.prompt.id for each in group.beside] == [f"{group.prompt.id}#judge{k}" for k in range(4)]
    replay = ["rollout.engine=replay", f"rollout.replay_from={tmp_path}/whole", "eval.every=0"]
    assert urlvr("train", config, *more, *replay, f"run.dir={tmp_path}/again").code == 0
    for again, whole in zip(rows(tmp_path / "again")[1:], rows(tmp_path / "whole")[1:], strict=True):
        assert {name: whole[name] for name in again} == again
    taken, expected = (weights(tmp_path / run, 3) for run in ("again", "whole"))
    for name in taken:  # the replay evaluates nothing, and builds no model to sample from, which draws random numbers
        assert taken[name] == expected[name] or name.startswith(("rng", "trainer.json"))


class Talker(DiceModel):
    """Answers 1, 2 or nothing, and judges by one character, at random."""

    def __init__(self, base: Path) -> None:
        tokenizer = load_tokenizer(base)
        super().__init__(len(tokenizer))
        answers, verdicts = ("c1#1", "c2#2", "q"), ("c", "#", "q")
        self.answers, self.verdicts = (
            [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts] for texts in (answers, verdicts)
        )
        self.end = tokenizer.eos_token_id

    def generate(self, ids: list[int], params: dict[str, Any]) -> tuple[list[int], list[float]]:
        verdict = params["max_new_tokens"] == 1
        tokens = self.random.choice(self.verdicts) if verdict else [*self.random.choice(self.answers), self.end]
        return tokens, [-self.random.random() for _ in tokens]


def test_verdicts_on_responses_that_were_generated_ahead_are_the_newest_weights_own(urlvr, config, base, tmp_path):
    vocab = json.loads((base / "config.json").read_text())["vocab_size"]
    server = FakeServer(Talker(base), vocab_size=vocab)
    ahead = ["rollout.engine=sglang", f"servers.pools.policy.urls=[{server.url}]", "servers.wait_s=30"]
    ahead += ["servers.transport=disk", "rollout.max_staleness=1", "algorithm.correction.old_logp=rollout"]
    try:
        outcome = urlvr("train", config, *setting(), *ahead, "run.steps=4", "eval.every=0", "rollout.record=true")
    finally:
        server.stop()
    assert outcome.code == 0, outcome.err
    assert sum(row["lesson/judge/per_prompt"] for row in rows(tmp_path / "run")[1:]) > 0
    ages = set()
    for step in range(1, 5):
        groups = read_groups(rollout_file(tmp_path / "run", step))
        ages |= {step - 1 - sample.oldest for sample in samples_of(groups)}
        assert {sample.oldest for group in groups for sample in samples_of(group.beside)} == {step - 1}
    assert ages <= {0, 1}  # how many are older depends on who is faster


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (setting(weights="reference"), "cotrain = 'vote' with weights = 'reference': the policy is what is trained"),
        (setting(samples=1), "cotrain = 'vote' with samples = 1"),
        (setting(temperature=0.5), "judge.temperature = 0.5: what is trained on is sampled at the temperature of"),
        (setting(cotrain="check"), "reward.providers.judge needs the signal 'check', which nothing in this run"),
        ([*setting(), "algorithm.loss.name=em_ft"], "algorithm.loss.name = 'em_ft', which trains on no reward"),
        ([*setting(), "algorithm.entropy_scaling=true"], "verdicts are not scored"),
    ],
)
def test_what_cannot_be_taught_is_told(urlvr, config, overrides, sentence):
    outcome = urlvr("train", config, *overrides)
    assert outcome.code == 2
    assert sentence in " ".join(outcome.err.split())
