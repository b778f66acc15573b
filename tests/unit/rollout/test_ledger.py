"""What the ledger was told is there after any crash; what a crash tore counts as never told."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_urlvr.rollout.ledger import OPEN_FILES, Ledger
from megatron_urlvr.types import Group, Prompt, Sample, Span


def group(prompt: int, token: int = 0) -> Group:
    """A group of two samples that met an update."""
    samples = [
        Sample(
            f"p{prompt}", k, [token, k], "x", "stop", torch.tensor([-0.5, -k]), 4, spans=(Span(3, 0, 1), Span(4, 1, 2))
        )
        for k in range(2)
    ]
    return Group(Prompt(f"p{prompt}", "", (1, 2)), samples)


def tokens(found: dict[str, Group]) -> dict[str, int]:
    return {prompt: group.samples[0].tokens[0] for prompt, group in found.items()}


def test_a_group_comes_back_with_its_log_probs_and_spans(tmp_path: Path) -> None:
    Ledger(tmp_path, 0).append(3, group(1, 7))
    [found] = Ledger(tmp_path, 1).groups(3).values()
    assert found.prompt == group(1).prompt
    for sample, original in zip(found, group(1, 7), strict=True):
        assert (sample.tokens, sample.spans, sample.version) == (original.tokens, original.spans, original.version)
        assert sample.logp is not None
        assert torch.equal(sample.logp, original.logp)


crash = st.one_of(st.none(), st.integers(0, 10**6), st.just("garbage"))
"""How a launch ends: cleanly, with its last record cut at a byte, or with bytes that mean nothing behind it."""


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.lists(st.tuples(st.integers(1, 3), st.integers(0, 4)), max_size=5), crash))
)
def test_any_history_of_launches_and_crashes_keeps_what_was_told_last(
    launches: list[tuple[int, list[tuple[int, int]], object]],
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, truth, count = Path(name), dict[tuple[int, int], dict[str, int]](), 0
        whole = dict[Path, int]()  # where the last record that was not torn ends
        for replica, told, end in launches:
            ledger, torn = Ledger(folder, replica), None
            for number, (step, prompt) in enumerate(told):
                count += 1
                path = folder / f"step_{step:06d}.r{replica}.groups"
                ledger.append(step, group(prompt, count))
                size, before = path.stat().st_size, whole.get(path, 0)
                assert size > before
                mine = truth.setdefault((step, replica), {})
                last = number == len(told) - 1
                if last and isinstance(end, int):  # the crash came while this record was written
                    torn = path, before + end % (size - before)
                else:
                    mine[f"p{prompt}"] = count
                    whole[path] = size
                    torn = (path, None) if end == "garbage" else None
            ledger.close()
            if torn is not None and torn[1] is not None:
                with torn[0].open("r+b") as file:
                    file.truncate(torn[1])
            elif torn is not None:
                with torn[0].open("ab") as file:
                    file.write(b"UGRP\xff\xff")
        for step in (1, 2, 3):
            expected: dict[str, int] = {}
            for replica in (0, 1, 2):
                expected |= truth.get((step, replica), {})
            assert tokens(Ledger(folder, 0).groups(step)) == expected


def test_a_record_that_rotted_ends_its_file_and_what_follows_is_told_again(tmp_path: Path, capsys) -> None:
    ledger = Ledger(tmp_path, 0)
    for prompt in range(3):
        ledger.append(1, group(prompt, prompt))
    ledger.close()
    [path] = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert tokens(Ledger(tmp_path, 0).groups(1)) == {"p0": 0}
    assert "the groups from there on are generated again" in capsys.readouterr().err
    again = Ledger(tmp_path, 0)
    again.append(1, group(1, 9))
    assert tokens(again.groups(1)) == {"p0": 0, "p1": 9}


def test_steps_are_forgotten_when_no_checkpoint_before_them_is_left(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, 0)
    for step in range(1, OPEN_FILES + 4):
        ledger.append(step, group(0, step))
    Ledger(tmp_path, 1).append(2, group(1))
    ledger.forget(3)
    assert ledger.steps() == list(range(4, OPEN_FILES + 4))
    ledger.discard(5)
    assert 5 not in ledger.steps()
    ledger.append(2, group(0, 99))
    assert tokens(ledger.groups(2)) == {"p0": 99}
    ledger.close()
