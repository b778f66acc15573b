"""Early voting: it ends only what cannot change the winner, and never one of the samples that are trained on."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch
from fake_models import DiceModel
from fake_sglang import FakeServer
from hypothesis import given, settings
from hypothesis import strategies as st
from server_contract import engine_for, prompts, push

from megatron_urlvr.config.errors import ConfigError
from megatron_urlvr.config.loader import load_config
from megatron_urlvr.data.grading.grader import Grader
from megatron_urlvr.rewards.voting import vote
from megatron_urlvr.rollout.early import EarlyVotes, decided
from megatron_urlvr.types import Sampling

QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart_sglang.yaml"


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from("abc"), max_size=6), st.integers(0, 4))
def test_a_decided_vote_has_the_same_winner_however_it_ends(so_far: list[str], missing: int) -> None:
    """Against every way in which the missing votes may fall, for different strings as different answers."""
    ends = itertools.product("abcd", repeat=missing)
    outcomes = {_winner([*so_far, *end]) for end in ends}
    if decided(Counter(so_far), missing, exact=True):
        assert len(outcomes) == 1
    elif so_far and missing:
        assert len(outcomes) > 1 or _tied(so_far, missing), "it waits only while it must"


def _winner(votes: list[str]) -> str | None:
    found = vote([votes.index(v) for v in votes]).winner
    return None if found is None else votes[found]


def _tied(so_far: list[str], missing: int) -> bool:
    counts = sorted(Counter(so_far).values(), reverse=True)
    return counts[0] - (counts[1] if len(counts) > 1 else 0) <= missing


def test_answers_that_may_turn_out_equal_count_together() -> None:
    assert decided({"1/2": 5, "2": 2, "3": 2}, 2, exact=True)
    assert not decided({"1/2": 5, "2": 2, "3": 2}, 2, exact=False)
    assert decided({"1/2": 7, "2": 2, "3": 2}, 2, exact=False)
    assert not decided({}, 0, exact=True)


class FirstToken(Grader):
    """The answer is whether the first token is below 15: most are."""

    def extract(self, text: str, *, finished: bool = True) -> str | None:
        return str(int(text.split()[0]) < 15) if text else None


def test_votes_that_cannot_matter_are_given_up_and_trained_ones_never(tmp_path: Path) -> None:
    server = FakeServer(DiceModel())
    (tmp_path / "model").mkdir()
    engine = engine_for(
        [], tmp_path / "model", tmp_path, transport="disk", pools={"policy": {"urls": [server.url], "concurrency": 4}}
    )
    engine.votes = EarlyVotes(FirstToken(), lambda tokens: " ".join(map(str, tokens)))
    try:
        push(engine, {"w": torch.zeros(1)}, 0)
        for group in engine.generate(prompts(8), Sampling(32, 8, certain=4)):
            assert 4 <= len(group) <= 32
            assert [sample.index for sample in group] == list(range(len(group)))
        found = engine.metrics()
        assert found["rollout/faults"] == 0
        assert 0 < found["rollout/early/groups"] <= 8
        assert found["rollout/early/tokens"] >= found["rollout/early/responses"] > 0
        assert all(len(group) == 32 for group in engine.generate(prompts(2), Sampling(32, 8))), "evaluation has all"
        assert engine.metrics()["rollout/early/groups"] == 0
    finally:
        engine.close()
        server.stop()


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["rollout.n_train=null"], "there are no votes to spare"),
        (["rollout.engine=embedded"], "samples all votes at once"),
        (["rollout.train_on=random"], "which are the short ones"),
        (["reward.terms.main={name: format}"], "majority_vote alone"),
    ],
)
def test_where_it_would_bias_or_do_nothing_it_is_refused(overrides: list[str], sentence: str) -> None:
    good = ["rollout.early_voting=true", "rollout.n_train=4", "reward.terms.main={name: majority_vote}"]
    load_config(QUICKSTART, good)
    with pytest.raises(ConfigError, match=sentence):
        load_config(QUICKSTART, [*good, *overrides])
