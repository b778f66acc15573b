"""The commands as a user calls them: what they print, where, and with which exit code."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml

from megatron_urlvr.config.loader import load_config
from megatron_urlvr.config.pretrain import PretrainConfig
from megatron_urlvr.config.root import Config
from megatron_urlvr.config.study import StudyConfig
from megatron_urlvr.exit_codes import ExitCode, UnusableInput

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture
def stand_in(monkeypatch):
    """Puts a function in the place of one that a command calls, and returns the list of its calls."""

    def _stand_in(module: str, name: str, result: object = 0) -> list[tuple[object, ...]]:
        calls: list[tuple[object, ...]] = []

        def called(*arguments: object) -> object:
            calls.append(arguments)
            if isinstance(result, Exception):
                raise result
            return result

        fake = ModuleType(module)
        setattr(fake, name, called)
        monkeypatch.setitem(sys.modules, module, fake)
        return calls

    return _stand_in


def test_the_command_line_imports_nothing_heavy(in_fresh_python):
    code = "import sys, megatron_urlvr.cli; print(sorted({n.split('.')[0] for n in sys.modules}))"
    loaded = in_fresh_python(code)
    for heavy in ("torch", "transformers", "megatron", "numpy", "omegaconf", "pydantic", "matplotlib"):
        assert f"'{heavy}'" not in loaded


def test_help_names_every_command(urlvr):
    outcome = urlvr("--help")
    assert outcome.code == 0
    for command in ["train", "pretrain", "eval", "report", "study", "config", "rewards", "runs", "samples", "doctor"]:
        assert f" {command} " in outcome.out


def test_train_gets_the_config_with_overrides_and_its_exit_code_is_the_commands(urlvr, stand_in, config_file):
    calls = stand_in("megatron_urlvr.train", "main", ExitCode.PREEMPTED)
    outcome = urlvr("train", config_file, "run.steps=3", "optim.weight_decay=0.5")
    assert outcome.code == 75
    ((config,),) = calls
    assert isinstance(config, Config)
    assert (config.run.steps, config.optim.weight_decay) == (3, 0.5)


def test_pretrain_reads_its_own_kind_of_config(urlvr, stand_in):
    calls = stand_in("megatron_urlvr.pretrain", "main")
    assert urlvr("pretrain", CONFIGS / "pretrain_chain_sum.yaml", "run.seed=5").code == 0
    ((config,),) = calls
    assert isinstance(config, PretrainConfig)
    assert config.run.seed == 5


def test_eval_passes_checkpoint_and_sets(urlvr, stand_in, config_file):
    calls = stand_in("megatron_urlvr.commands.evaluate", "main")
    assert urlvr("eval", config_file, "--checkpoint", "step_000050", "--set", "held_out", "--reward", "all").code == 0
    assert urlvr("eval", config_file).code == 0
    assert [call[1:] for call in calls] == [("step_000050", ["held_out"], ["all"]), (None, None, None)]


def test_eval_of_a_set_that_is_not_there_is_unusable_input(urlvr, config_file):
    outcome = urlvr("eval", config_file, "--set", "held_oot")
    assert outcome.code == 2
    assert outcome.err == (
        "--set held_oot: the config has no such evaluation set. Did you mean held_out? Known: held_out.\n"
    )


def test_report_prints_where_the_page_is(urlvr, stand_in, tmp_path):
    calls = stand_in("megatron_urlvr.analysis.report", "write_report", tmp_path / "page.html")
    outcome = urlvr("report", "a", "b", "--out", "c")
    assert (outcome.code, outcome.out) == (0, f"{tmp_path / 'page.html'}\n")
    assert calls == [([Path("a"), Path("b")], Path("c"))]


def test_study_gets_its_grid_and_its_file(urlvr, stand_in, tmp_path):
    calls = stand_in("megatron_urlvr.analysis.study", "run_study")
    grid = tmp_path / "grid.yaml"
    grid.write_text("{name: n, dir: d, title: t, runs: {a: {config: a.yaml}}}")
    assert urlvr("study", grid, "seeds=[1,2]", "--jobs", "2").code == 0
    ((config, path, jobs),) = calls
    assert isinstance(config, StudyConfig)
    assert (config.seeds, path, jobs) == ([1, 2], grid, 2)


def test_a_bad_config_is_sentences_on_stderr_and_code_2(urlvr, config_file):
    outcome = urlvr("train", config_file, "run.stepz=3", "optim.lr=-1")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith(f"{config_file}: 2 violations.\n  - run.stepz = 3: no such setting. Did you mean")
    assert "Traceback" not in outcome.err


def test_unusable_input_found_later_ends_the_same_way_and_once_under_torchrun(
    urlvr, stand_in, config_file, monkeypatch
):
    stand_in("megatron_urlvr.train", "main", UnusableInput("the file train.jsonl is empty."))
    outcome = urlvr("train", config_file)
    assert (outcome.code, outcome.err) == (2, "the file train.jsonl is empty.\n")
    monkeypatch.setenv("RANK", "3")
    outcome = urlvr("train", config_file)
    assert (outcome.code, outcome.err) == (2, "")


def test_an_error_of_the_program_keeps_its_traceback(stand_in, config_file, monkeypatch):
    from megatron_urlvr import cli

    stand_in("megatron_urlvr.train", "main", ZeroDivisionError("a bug"))
    monkeypatch.setattr(sys, "argv", ["urlvr", "train", str(config_file)])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_config_show_prints_yaml_that_loads_to_the_same_config(urlvr, config_file, tmp_path):
    outcome = urlvr("config", "show", config_file, "run.steps=77")
    assert outcome.code == 0
    assert yaml.safe_load(outcome.out)["run"]["steps"] == 77
    again = tmp_path / "again.yaml"
    again.write_text(outcome.out)
    assert load_config(again) == load_config(config_file, ["run.steps=77"])


def test_config_show_tells_the_kinds_of_config_apart(urlvr):
    shown = yaml.safe_load(urlvr("config", "show", CONFIGS / "pretrain_chain_sum.yaml").out)
    assert list(shown["snapshots"]) == ["weak"]


def test_config_show_without_a_file_asks_for_one(urlvr):
    outcome = urlvr("config", "show")
    assert outcome.code == 2
    assert "give the config to show" in outcome.err


def test_rewards_say_formula_needs_range_and_source(urlvr):
    outcome = urlvr("rewards")
    assert outcome.code == 0
    for name in ("majority_vote", "probability", "self_certainty", "ground_truth (supervised: reads labels)"):
        assert f"\n{name}\n" in f"\n{outcome.out}"
    assert outcome.out.count("  formula  ") == outcome.out.count("  source   ") == outcome.out.count("  needs    ")
    one = urlvr("rewards", "majority_vote").out
    assert one.splitlines()[0] == "majority_vote"
    assert one.count("  formula  ") == 1
    assert urlvr("rewards", "majority").code == 2


def test_runs_are_listed_with_what_became_of_them(urlvr, run, tmp_path):
    outcome = urlvr("runs", tmp_path / "runs")
    assert outcome.code == 0
    (line,) = [line for line in outcome.out.splitlines() if "small" in line]
    cells = [cell.strip() for cell in line.split("  ") if cell.strip()]
    assert cells == [
        "small", "trajectory_entropy (sum)", "3", "10/10", "held_out", "0.400", "0.900 @ 5", "0.000",
        "rose and collapsed", "done",
    ]  # fmt: skip


def test_a_run_that_was_killed_is_not_called_running(urlvr, run, tmp_path):
    run.write_status("running", 4)
    assert "interrupted, resumable" in urlvr("runs", tmp_path).out
    with run.lock():
        assert "interrupted" not in urlvr("runs", tmp_path).out


def test_a_damaged_run_does_not_hide_the_others(urlvr, run, tmp_path):
    broken = tmp_path / "runs" / "broken"
    broken.mkdir()
    (broken / "config.yaml").write_text("nothing: here")
    (broken / "status.json").write_text("{}")
    out = urlvr("runs", tmp_path / "runs").out
    assert "unreadable: " in out
    assert "rose and collapsed" in out


def test_a_folder_without_runs_is_unusable_input(urlvr, tmp_path):
    assert urlvr("runs", tmp_path).code == 2
    assert urlvr("runs", tmp_path / "missing").code == 2


def test_samples_of_the_last_step_come_from_the_probes(urlvr, run):
    outcome = urlvr("samples", run.path)
    assert outcome.code == 0
    assert outcome.out.startswith("step 10, probes: 3 of 3 samples\n")
    assert "\n12= #0 | reward -2 | right | answer 3\n  ? 12=\n  > c3#3\n" in outcome.out
    assert "\n77= #0 | reward -3 | wrong | no answer\n  ? 77=\n  > at 10\n" in outcome.out


def test_samples_are_sorted_and_filtered(urlvr, run):
    out = urlvr("samples", run.path, "--step", 0, "--sort=-reward", "--prompt", "12").out
    assert out.index("reward -1") < out.index("reward -2")
    assert "77=" not in out


def test_recorded_rollouts_get_the_reward_of_their_config(urlvr, run):
    out = urlvr("samples", run.path, "--step", 4, "--sort", "reward", "--limit", 2).out
    assert out.startswith("step 4, rollouts: 2 of 6 samples\n")
    assert "train/0 #1 | reward -2 | answer 5 | 2 tokens, cut off\n  ? 00=\n  > long\n" in out
    assert "train/0 #0" not in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--step", "3"], "nothing was kept at this step of"),
        (["--step", "3"], "The nearest is 4."),
        (["--prompt", "99"], "no prompt of step 10 contains it"),
        (["--sort", "rewrd"], "Did you mean reward?"),
        (["--sort", "length"], "the probes of step 10 do not say it"),
    ],
)
def test_samples_that_are_not_there_are_said_not_to_be(urlvr, run, arguments, said):
    outcome = urlvr("samples", run.path, *arguments)
    assert outcome.code == 2
    assert said in outcome.err


def test_a_run_without_samples_says_how_to_keep_some(urlvr, tmp_path):
    (tmp_path / "config.yaml").write_text("run: {name: small}\n")
    outcome = urlvr("samples", tmp_path)
    assert outcome.code == 2
    assert "rollout.record=true" in outcome.err


@pytest.mark.parametrize("command", [("samples",), ("report",), ("rollout", "status")])
def test_a_folder_that_is_no_runs_is_said_to_be_none(urlvr, tmp_path, command):
    outcome = urlvr(*command, tmp_path / "none")
    assert outcome.code == 2
    assert f"{tmp_path / 'none'}" in outcome.err
    assert "folder" in outcome.err


def test_doctor_says_what_there_is_and_what_follows(urlvr):
    outcome = urlvr("doctor")
    assert outcome.code == 0
    for word in ("python", "torch", "megatron-core", "memory", "disk", "gpu", "What follows:", "run.device=auto takes"):
        assert word in outcome.out


def test_doctor_draws_its_conclusions_from_the_machine():
    from megatron_urlvr.doctor import NEEDED, OPTIONAL, Gpu, Machine, follows

    versions: dict[str, str | None] = dict.fromkeys((*NEEDED, *OPTIONAL), "1.0")
    basic = Machine("3.11", "Linux", versions, 4, None, 64 << 30, 32 << 30, 1 << 40, Path("/x"), None)
    assert follows(basic)[0].startswith("run.device=auto takes the CPU (torch is a CPU build): gloo")
    assert any("OMP_NUM_THREADS is not set" in sentence for sentence in follows(basic))
    gpu = Machine(**{**vars(basic), "cuda": "12.8", "gpus": [Gpu("H", 1, (9, 0))] * 2})
    assert "takes CUDA (2 GPUs): NCCL" in follows(gpu)[0]
    assert follows(gpu)[1] == "the policy is built from Transformer Engine's layers."
    bare = Machine(**{**vars(gpu), "versions": {**versions, "transformer-engine": None, "torch": None}, "disk_free": 1})
    text = " ".join(follows(bare))
    assert follows(bare)[0].startswith("torch is not installed")
    assert "no Transformer Engine" in text
    assert "lower checkpoint.keep" in text


def test_names_of_exit_codes_are_the_documented_ones():
    expected = SimpleNamespace(DONE=0, FAILED=1, UNUSABLE_INPUT=2, STOPPED=3, NON_FINITE=4, NO_SERVERS=5, PREEMPTED=75)
    assert {code.name: code.value for code in ExitCode} == vars(expected)
