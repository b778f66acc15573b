"""Groups as records, and records replayed: exact to the bit."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_urlvr.exit_codes import UnusableInput
from megatron_urlvr.rollout.records import group_from_record, group_to_record, read_records, write_records
from megatron_urlvr.rollout.replay import ReplayEngine, rollout_file
from megatron_urlvr.types import STATISTICS, Group, Prompt, Sample, Sampling, TokenStats

FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)
TEXT = st.text(max_size=8)


def vector(size: int):
    return st.lists(FLOATS, min_size=size, max_size=size).map(lambda values: torch.tensor(values, dtype=torch.float32))


@st.composite
def groups(draw) -> Group:
    prompt = Prompt(
        draw(TEXT),
        draw(TEXT),
        tuple(draw(st.lists(st.integers(0, 2**31), max_size=4))),
        draw(st.dictionaries(TEXT, st.one_of(st.integers(), TEXT, st.lists(st.integers(), max_size=3)), max_size=2)),
    )
    samples = []
    for index in range(draw(st.integers(1, 3))):
        tokens = draw(st.lists(st.integers(0, 2**31), min_size=1, max_size=4))
        stats = {name: draw(vector(len(tokens))) for name in draw(st.sets(st.sampled_from(sorted(STATISTICS))))}
        samples.append(
            Sample(
                prompt_id=prompt.id,
                index=index,
                tokens=tokens,
                text=draw(TEXT),
                finish=draw(st.sampled_from(["stop", "length"])),
                logp=draw(st.one_of(st.none(), vector(len(tokens)))),
                version=draw(st.integers(0, 9)),
                answer=draw(st.one_of(st.none(), TEXT)),
                stats=draw(st.sampled_from([None, TokenStats(**stats)])),
            )
        )
    classes = draw(st.lists(st.one_of(st.none(), st.integers(0, 3)), min_size=len(samples), max_size=len(samples)))
    signals = draw(st.dictionaries(TEXT, vector(len(samples)), max_size=2))
    return Group(prompt, samples, classes, signals)


def bits(tensor: torch.Tensor | None) -> bytes | None:
    return None if tensor is None else tensor.numpy().tobytes()


def everything(group: Group) -> object:
    """All of a group in comparable form, floats as their bits."""
    samples = [
        (
            {k: v for k, v in vars(sample).items() if k not in ("logp", "stats")},
            bits(sample.logp),
            None if sample.stats is None else {name: bits(value) for name, value in vars(sample.stats).items()},
        )
        for sample in group.samples
    ]
    return group.prompt, samples, group.classes, {name: bits(value) for name, value in group.signals.items()}


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(groups())
def test_a_group_is_the_same_to_the_bit_after_a_trip_through_json(group: Group):
    text = json.dumps(group_to_record(group))
    back = group_from_record(json.loads(text))
    assert everything(back) == everything(group)
    assert json.dumps(group_to_record(back)) == text


def test_a_group_is_the_same_to_the_bit_after_a_trip_through_a_file(tmp_path: Path):
    values = torch.tensor([-0.0, 1e-45, math.inf, -math.inf, math.nan, 0.1, -1.5e38])
    prompt = Prompt("p", "é\n…", (1, 2), {"numbers": [3, 4]})
    written = [
        Group(prompt, [Sample("p", 0, [1] * 7, "x", "stop", values * (k + 1), 3, None)], [None], {"judge": values[:1]})
        for k in range(50)
    ]
    path = tmp_path / "deep" / "step_000001.jsonl.zst"
    write_records(path, map(group_to_record, written))
    assert [everything(group_from_record(r)) for r in read_records(path)] == [everything(group) for group in written]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_float64_signals_are_stored_as_float32():
    group = Group(Prompt("p", "", (1,)), [Sample("p", 0, [1], "", "stop")], [None], {"s": torch.tensor([0.1]).double()})
    back = group_from_record(group_to_record(group))
    assert back.signals["s"].numpy().tobytes() == np.array([0.1], dtype=np.float32).tobytes()


# -- replay -----------------------------------------------------------------------------------------------------------


def recorded(folder: Path, step: int, prompts: int = 3, n: int = 4) -> list[Group]:
    made = []
    for i in range(prompts):
        prompt = Prompt(f"train/{i}", f"text {i}", (i, 1))
        samples = [
            Sample(prompt.id, k, [k, step], f"{k}", "length", torch.rand(2), stats=TokenStats(logp=torch.rand(2)))
            for k in range(n)
        ]
        made.append(Group(prompt, samples, [0] * n, {"correct": torch.ones(n)}))
    write_records(rollout_file(folder, step), map(group_to_record, made))
    return made


def test_replay_serves_each_steps_groups_bare_of_what_the_recording_run_computed(tmp_path: Path):
    steps = {step: recorded(tmp_path, step) for step in (1, 2)}
    engine = ReplayEngine(tmp_path)
    for step, made in steps.items():
        engine.begin_step(step)
        prompts = [group.prompt for group in made][::-1]
        found = list(engine.generate(prompts, Sampling(3, 9)))
        assert [group.prompt for group in found] == prompts
        for group, source in zip(found, made[::-1], strict=True):
            assert (group.classes, group.signals) == ([], {})
            assert len(group.samples) == 3
            for sample, original in zip(group.samples, source.samples, strict=False):
                assert sample.tokens == original.tokens
                assert bits(sample.logp) == bits(original.logp)
                assert sample.stats is None


def test_replay_refuses_what_was_not_recorded(tmp_path: Path):
    with pytest.raises(UnusableInput, match=r"no recorded rollouts"):
        ReplayEngine(tmp_path)
    made = recorded(tmp_path, 1)
    engine = ReplayEngine(tmp_path)
    with pytest.raises(UnusableInput, match=r"step_000002\.jsonl\.zst was not recorded"):
        engine.begin_step(2)
    engine.begin_step(1)
    with pytest.raises(UnusableInput, match="step 1 holds no prompt 'train/9'"):
        list(engine.generate([Prompt("train/9", "", (1,))], Sampling(2, 9)))
    with pytest.raises(UnusableInput, match=r"rollout\.n_votes = 5, but step 1 of .* recorded 4 samples"):
        list(engine.generate([made[0].prompt], Sampling(5, 9)))


def test_replay_refuses_a_prompt_of_the_same_name_and_another_text(tmp_path: Path):
    recorded(tmp_path, 1)
    engine = ReplayEngine(tmp_path)
    engine.begin_step(1)
    with pytest.raises(UnusableInput, match=r"prompt 'train/0' reads 'text 0' there and 'other' here"):
        list(engine.generate([Prompt("train/0", "other", (5, 6))], Sampling(2, 9)))


def test_replay_takes_the_weights_and_keeps_their_version(tmp_path: Path):
    recorded(tmp_path, 1)
    engine = ReplayEngine(tmp_path)
    stream = iter([("a", torch.zeros(1)), ("b", torch.zeros(1))])
    engine.begin_update(4)
    engine.update(stream)
    engine.end_update()
    assert engine.version == 4
    assert next(stream, None) is None
