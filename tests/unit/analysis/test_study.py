"""A study: everything once, a few at a time, again only what is not done, and one report at the end."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import fake_cli
import pytest

from megatron_urlvr.analysis.study import commands_of, plan_study, report_study, run_study
from megatron_urlvr.config.errors import ConfigError
from megatron_urlvr.config.loader import load_config, to_yaml
from megatron_urlvr.config.study import StudyConfig
from megatron_urlvr.exit_codes import UnusableInput

CLI = (sys.executable, fake_cli.__file__)
PRETRAIN = """
run: {name: tiny, dir: bases, seed: 0, steps: 1}
data: {task: chain_sum, max_new_tokens: 16}
optim: {lr: 1.0e-3}
snapshots: {weak: {step: 1}, strong: {step: 1}}
"""
RUN = """
run: {name: run, dir: nowhere, steps: 10, seed: 7}
model: {path: nowhere}
data: {train: {task: chain_sum, size: 64}}
eval: {every: 1, sets: {held_out: {task: chain_sum, size: 8}}}
rollout: {prompts: 4, n_votes: 4, max_new_tokens: 16}
reward: {terms: {main: {name: trajectory_entropy, aggregation: sum}}}
optim: {lr: 1.0e-3}
"""
STUDY = """
name: demo
dir: out
title: Two beliefs
notes: [Failure modes are planted.]
bases: {tiny: {config: pretrain.yaml}}
runs:
  weak: {config: run.yaml, base: tiny/weak, label: weak belief}
  strong: {config: run.yaml, base: tiny/strong}
  truth: {config: run.yaml, base: tiny/weak, overrides: [reward.terms.main.name=ground_truth]}
jobs: 2
"""
ONLY_WEAK = ["runs.strong=null", "runs.truth=null"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with a study in it, in which the fake command leaves its notes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FAKE_CLI", str(tmp_path))
    monkeypatch.setitem(sys.modules, "megatron_urlvr.pretrain", SimpleNamespace(base_dir=fake_cli.base_dir))
    for name, text in {"pretrain": PRETRAIN, "run": RUN, "study": STUDY}.items():
        Path(f"{name}.yaml").write_text(text)
    return tmp_path


def study(*overrides):
    return load_config("study.yaml", overrides, StudyConfig)


def go(*overrides, **options):
    config = study(*overrides)
    fake_cli.write_resolved(plan_study(config, Path("study.yaml")), to_yaml)
    return run_study(config, Path("study.yaml"), cli=CLI, **options)


def calls():
    found = Path("calls").read_text().splitlines() if Path("calls").exists() else []
    Path("calls").unlink(missing_ok=True)
    return sorted(found)


def text_of(page):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.read_text()))


def test_a_study_makes_its_base_once_trains_every_run_on_its_snapshot_and_reports_on_all(place, capsys):
    assert go() == 0
    assert calls() == [
        "pretrain bases/tiny-0",
        "train strong on bases/tiny-0/strong with 1 thread",
        "train truth on bases/tiny-0/weak with 1 thread",
        "train weak on bases/tiny-0/weak with 1 thread",
    ]
    text = text_of(Path("out/report/report.html"))
    for words in ("Two beliefs", "Failure modes are planted.", "weak belief : rose and held", "greedy 0.900"):
        assert words in text
    assert Path("out/report/overview.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for words in (
        "out/report/report.html",
        "overview.png",
        "tensorboard --logdir out/runs",
        "out/runs/<run>/checkpoints",
    ):
        assert words in printed
    assert "maj@16" in Path("out/logs/pretrain/tiny.log").read_text()


def test_what_is_done_is_skipped_and_what_failed_is_tried_again_without_stopping_the_others(place, capsys):
    Path("strong.fails").touch()
    assert go(jobs=1) == 1
    assert len(calls()) == 4
    failure = "strong failed: exit code 4: the loss was NaN; log: out/logs/strong.log"
    assert failure in capsys.readouterr().err
    text = text_of(Path("out/report/report.html"))
    assert "strong failed: exit code 4: the loss was NaN." in text
    assert "truth : rose and held" in text
    Path("strong.fails").unlink()
    assert go() == 0
    assert calls() == ["pretrain bases/tiny-0", "train strong on bases/tiny-0/strong with 1 thread"]
    assert go() == 0
    assert calls() == []


def test_a_done_run_whose_settings_changed_is_given_to_train_which_knows_what_may_change(place):
    assert go() == 0
    calls()
    assert go("runs.weak.overrides=[run.steps=12]") == 0
    assert calls() == ["pretrain bases/tiny-0", "train weak on bases/tiny-0/weak with 1 thread"]


def test_a_base_that_ended_without_a_snapshot_fails_the_runs_that_start_from_it(place, capsys):
    Path("strong.missing").touch()
    assert go() == 1
    assert "strong failed: pretrain/tiny ended without the snapshot strong" in capsys.readouterr().err
    assert not any(call.startswith("train strong") for call in calls())


def test_with_seeds_bases_and_runs_are_replicated_and_reported_as_one_line(place):
    assert go("seeds=[0, 3]", *ONLY_WEAK) == 0
    assert calls() == [
        "pretrain bases/tiny-0",
        "pretrain bases/tiny-3",
        "train weak-seed0 on bases/tiny-0/weak with 1 thread",
        "train weak-seed3 on bases/tiny-3/weak with 1 thread",
    ]
    text = text_of(Path("out/report/report.html"))
    assert "weak belief : rose and held in 2 of 2" in text
    assert "weak belief, seed 3" in text
    assert Path("out/runs/weak/seed3/DONE").exists()


def test_two_bases_that_are_the_same_are_made_once(place):
    assert go("bases.again={config: pretrain.yaml}", "runs.strong.base=again/strong") == 0
    assert sum(call.startswith("pretrain") for call in calls()) == 1


def test_ctrl_c_reaches_the_runs_and_the_same_command_continues(place):
    """In a process of its own, because it is the whole process that is interrupted."""
    Path("weak.waits").touch()
    fake_cli.write_resolved(plan_study(study(*ONLY_WEAK), Path("study.yaml")), to_yaml)
    code = (
        "import sys; from types import SimpleNamespace; from pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(fake_cli.__file__).parent)!r}); import fake_cli\n"
        "sys.modules['megatron_urlvr.pretrain'] = SimpleNamespace(base_dir=fake_cli.base_dir)\n"
        "from megatron_urlvr.config.loader import load_config\n"
        "from megatron_urlvr.config.study import StudyConfig\n"
        "from megatron_urlvr.analysis.study import run_study\n"
        f"config = load_config('study.yaml', {ONLY_WEAK!r}, StudyConfig)\n"
        "sys.exit(run_study(config, Path('study.yaml'), cli=(sys.executable, fake_cli.__file__)))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    for line in process.stdout:
        if "weak started" in line:
            break
    log = Path("out/logs/weak.log")
    while "waiting" not in log.read_text():
        assert process.poll() is None
    os.kill(process.pid, signal.SIGINT)
    rest = process.stdout.read()
    assert process.wait() == 75
    assert "interrupted; the same command continues" in rest
    assert '"preempted"' in Path("out/runs/weak/status.json").read_text()
    Path("weak.waits").unlink()
    assert go(*ONLY_WEAK) == 0


def test_what_is_left_can_be_run_elsewhere_and_reported_on_here(place):
    """A cluster makes the runs from the commands that are printed; the report needs no run to be made here."""
    with pytest.raises(UnusableInput, match="none of the study's runs is there yet"):
        report_study(study(), Path("study.yaml"))
    assert go(*ONLY_WEAK) == 0
    calls()
    left = commands_of(study(), Path("study.yaml"))
    assert [line.split()[:3] for line in left] == [
        ["urlvr", "pretrain", "pretrain.yaml"],
        ["urlvr", "train", "run.yaml"],
        ["urlvr", "train", "run.yaml"],
    ]
    plan = plan_study(study(), Path("study.yaml"))
    assert shlex.split(left[-1])[2:] == list(next(run for run in plan.runs if run.run == "truth").arguments)
    Path("out/report/report.html").unlink()
    report_study(study(), Path("study.yaml"))
    assert "weak belief" in text_of(Path("out/report/report.html"))
    assert calls() == []


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("runs.weak.base=tiny/week", r"has no snapshot 'week'\. Did you mean weak\?"),
        ("runs.weak.overrides=[optim.lrr=1]", r"optim\.lrr"),
        ("runs.weak.config=absent.yaml", r"absent\.yaml"),
        ("bases.tiny.overrides=[run.steps=none]", r"run\.steps"),
        ("{select_set: held_out, measure_set: other}", r"does not evaluate 'other'"),
    ],
)
def test_what_is_wrong_with_any_config_is_said_before_anything_runs(place, override, sentence):
    overrides = ["select_set=held_out", "measure_set=other"] if override.startswith("{") else [override]
    with pytest.raises(UnusableInput, match=sentence):
        go(*overrides)
    assert calls() == []
    assert not Path("out/runs").exists()


def test_all_bad_configs_are_listed_at_once(place):
    with pytest.raises(UnusableInput) as caught:
        plan_study(
            study("runs.weak.overrides=[optim.lrr=1]", "runs.strong.overrides=[rollout.prompts=0]"), Path("study.yaml")
        )
    assert "optim.lrr" in str(caught.value)
    assert "rollout.prompts" in str(caught.value)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("runs.weak.base=other/weak", r"must be <base>/<snapshot> with a base of this study \(tiny\)"),
        ("runs.weak.base=weak", r"must be <base>/<snapshot>"),
        ("runs={'a b': {config: run.yaml}}", r"'a b': keys of bases and runs name folders"),
        ("seeds=[1, 1]", r"must be different numbers"),
        ("select_set=held_out", r"go together"),
    ],
)
def test_a_study_that_contradicts_itself_is_refused_with_a_sentence(place, override, sentence):
    with pytest.raises(ConfigError, match=sentence):
        study(override)
