"""Base policies are made once, the same each time, and trained from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_runs import PRETRAIN, Command, write_config

from megatron_urlvr import pretrain

ROOT = Path(__file__).parents[2]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Pretraining of six steps with snapshots on the way."""
    short = {**PRETRAIN, "snapshots": {"untrained": {"step": 0}, "early": {"step": 3}, "late": {"step": 6}}}
    return write_config(tmp_path / "pretrain.yaml", short, run={"dir": str(tmp_path / "bases"), "steps": 6, "batch": 8})


def made(tmp_path: Path) -> Path:
    """The folder named by the config's hash."""
    (folder,) = (path for path in (tmp_path / "bases").iterdir() if not path.is_symlink())
    return folder


def test_a_base_is_made_once_and_told_again(urlvr: Command, file: Path, tmp_path: Path, monkeypatch) -> None:
    first = urlvr("pretrain", file)
    assert first.code == 0
    told = [line for line in first.out.splitlines() if not line.startswith("saved")]
    assert [line.split()[0] for line in told] == [str(made(tmp_path) / name) for name in ("untrained", "early", "late")]
    assert "step 6: avg@16 0." in told[2]
    monkeypatch.setattr(pretrain.Pretraining, "__init__", lambda *a: pytest.fail("it is there already"))
    again = urlvr("pretrain", file)
    assert (again.code, again.out.splitlines()) == (0, told)
    assert (tmp_path / "bases/late/model.safetensors").exists()


def test_the_same_config_gives_the_same_bits_and_another_seed_others(urlvr, file, tmp_path):
    def weights(folder: str, *overrides: str) -> bytes:
        assert urlvr("pretrain", file, f"run.dir={tmp_path / folder}", *overrides).code == 0
        return (tmp_path / folder / "late/model.safetensors").read_bytes()

    first = weights("one")
    assert weights("one", "run.seed=1") != first
    assert weights("other") == first


def test_two_at_a_time_do_not_disturb_each_other(urlvr, file, tmp_path, monkeypatch):
    from megatron_urlvr.config.loader import load_config
    from megatron_urlvr.config.pretrain import PretrainConfig
    from megatron_urlvr.run.folder import RunLocked

    refusals = []
    original = pretrain.Pretraining.take_snapshots

    def take_snapshots(self, step):
        if step == 3:
            with pytest.raises(RunLocked) as refused:
                pretrain.main(load_config(file, [], PretrainConfig))
            refusals.append(str(refused.value))
        original(self, step)

    monkeypatch.setattr(pretrain.Pretraining, "take_snapshots", take_snapshots)
    assert urlvr("pretrain", file).code == 0
    assert refusals[0].startswith(f"{made(tmp_path)} is in use by ")


def test_a_base_that_was_broken_off_is_begun_again(urlvr, file, tmp_path, monkeypatch):
    whole = urlvr("pretrain", file, f"run.dir={tmp_path}/whole").out.splitlines()[-1]

    def broken_off(self, step):
        if step == 4:
            raise KeyboardInterrupt
        original(self, step)

    original = pretrain.Pretraining.take_snapshots
    with monkeypatch.context() as patch:
        patch.setattr(pretrain.Pretraining, "take_snapshots", broken_off)
        assert urlvr("pretrain", file).code != 0
    assert not (made(tmp_path) / "pretraining.json").exists()
    outcome = urlvr("pretrain", file)
    assert outcome.code == 0
    assert outcome.out.splitlines()[-1].split("step 6")[1] == whole.split("step 6")[1]


def test_a_band_that_is_never_reached_says_what_to_do(urlvr, file, tmp_path):
    outcome = urlvr("pretrain", file, 'snapshots={"best": {"maj_at_least": 1.0}}', "data.check_every=3")
    assert outcome.code == 2
    assert "snapshots best were not reached in run.steps = 6" in outcome.err
    assert "Traceback" not in outcome.err


def test_a_vocabulary_that_is_too_small_is_refused(urlvr, file):
    outcome = urlvr("pretrain", file, "model.vocab_size=20")
    assert outcome.code == 2
    assert "model.vocab_size = 20, but the task's tokenizer has 21 entries" in outcome.err


@pytest.mark.parametrize("settings", ["model.tied=true", "model.vocab_size=25", "data.task=countdown"])
def test_other_shapes_and_tasks_are_pretrained_and_trained_from(urlvr, file, config, tmp_path, settings):
    short = ["snapshots.untrained=null", "snapshots.early=null", "data.max_new_tokens=20"]
    assert urlvr("pretrain", file, settings, *short).code == 0
    train = [f"model.path={tmp_path}/bases/late", "run.steps=1", "data.max_prompt_tokens=16"]
    if settings == "data.task=countdown":
        train += [f'{place}={{"task": "countdown", "size": 8}}' for place in ("data.train", "eval.sets.held_out")]
    assert urlvr("train", config, *train).code == 0


@pytest.mark.parametrize(
    ("name", "lowest", "highest"), [("chain_sum", 0.5, 0.75), ("chain_sum_strong", 0.95, 1.0)], ids=["weak", "strong"]
)
def test_the_bases_of_the_demo_believe_what_it_says_they_do(urlvr: Command, tmp_path: Path, name, lowest, highest):
    """Their whole pretraining, on this machine's own rounding: the demo is nothing without them."""
    assert urlvr("pretrain", ROOT / f"configs/pretrain_{name}.yaml", f"run.dir={tmp_path}").code == 0
    (summary,) = tmp_path.glob("*-*/pretraining.json")
    (base,) = json.loads(summary.read_text()).values()
    assert lowest <= base["measured"]["maj_at_16"] <= highest
