"""Which checks of pretraining become a base policy."""

from types import SimpleNamespace

import pytest

from megatron_urlvr.config.pretrain import Snapshot
from megatron_urlvr.pretrain import Measured, Pretraining


def snapshots(maj: list[float], **rules: Snapshot) -> dict[str, tuple[int, str]]:
    """(step, note) of each snapshot when the checks after steps 10, 20, ... measure `maj`; training ends with them, or
    once nothing is pending."""
    run = Pretraining.__new__(Pretraining)
    run.config = SimpleNamespace(data=SimpleNamespace(check_every=10))  # type: ignore[assignment]
    run.pending, run.saved, run.above = dict(rules), {}, {}
    taken: dict[str, tuple[int, str]] = {}

    def save(name: str, measured: Measured, note: str = "") -> None:
        run.saved[name] = {}
        taken[name] = (measured.step, note)

    run._save = save  # type: ignore[method-assign]
    run.measure = lambda step: Measured(step, 0.0, maj[step // 10 - 1] if step else 0.0, 0.0, 1.0)  # type: ignore[method-assign]
    for step in range(10 * len(maj) + 1):
        run.take_snapshots(step)
        if not run.pending:
            break
    return taken


BAND = {"maj_at_least": 0.6, "maj_at_most": 0.75}


@pytest.mark.parametrize(
    ("maj", "take", "step"),
    [
        ([0.1, 0.62, 0.7, 0.8, 0.9], "first", 20),
        ([0.1, 0.62, 0.7, 0.8, 0.9], "last", 30),
        ([0.1, 0.62, 0.8, 0.7, 0.8, 0.9, 0.7], "last", 40),  # one check above does not end the band, two in a row do
        ([0.1, 0.62, 0.7], "last", 30),  # training ended inside it
    ],
)
def test_a_band_gives_its_first_or_its_last_check(maj: list[float], take: str, step: int) -> None:
    rule = Snapshot.model_validate({**BAND, "take": take})
    assert snapshots(maj, weak=rule) == {"weak": (step, "")}


def test_a_band_that_checks_jump_over_is_taken_above_it_and_says_so() -> None:
    for take in ("first", "last"):
        found = snapshots([0.1, 0.8, 0.9], weak=Snapshot.model_validate({**BAND, "take": take}))
        assert found["weak"][0] == 20
        assert "above the band's upper end 0.75" in found["weak"][1]


def test_steps_and_bands_are_taken_side_by_side() -> None:
    found = snapshots(
        [0.3, 0.7, 0.96], at=Snapshot(step=15), strong=Snapshot(maj_at_least=0.95), start=Snapshot(step=0)
    )
    assert {name: step for name, (step, _) in found.items()} == {"start": 0, "at": 15, "strong": 30}


def test_a_band_that_is_never_reached_is_not_taken() -> None:
    assert snapshots([0.1, 0.2], weak=Snapshot.model_validate(BAND)) == {}
