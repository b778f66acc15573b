"""Files, `extends` and overrides: what of each layer is left in the config."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_urlvr.config.data import JsonlSource, TaskSource
from megatron_urlvr.config.loader import load_config, model_of, parse_override, to_yaml
from megatron_urlvr.config.pretrain import PretrainConfig
from megatron_urlvr.config.root import Config
from megatron_urlvr.config.study import StudyConfig

CONFIGS = Path(__file__).parents[3] / "configs"
WHOLE = sorted(path for path in CONFIGS.glob("*.yaml") if path.name != "base.yaml")  # which is only ever extended


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.name)
def test_every_config_of_the_project_loads_and_survives_a_round_trip(path, tmp_path):
    config = load_config(path, [], model_of(path))
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(to_yaml(config))
    assert load_config(resolved, [], type(config)) == config


def test_the_quickstart_is_the_run_of_the_design():
    config = load_config(CONFIGS / "quickstart.yaml")
    assert config.reward.terms["main"].name == "trajectory_entropy"
    assert config.reward.terms["main"].options == {"aggregation": "sum", "span": "all", "empty": None}
    assert (config.rollout.prompts, config.rollout.n_votes, config.optim.lr) == (16, 16, 2.5e-4)
    assert (config.run.steps, config.eval.every, config.eval.sets["held_out"].samples) == (100, 5, 4)


def test_a_child_replaces_values_and_keeps_the_rest(write):
    write()
    child = write("extends: run.yaml\nrun: {steps: 99}\noptim: {lr: 2e-3, warmup_steps: 3}", "child.yaml")
    config = load_config(child)
    assert (config.run.steps, config.run.name) == (99, "small")
    assert (config.optim.lr, config.optim.warmup_steps) == (2e-3, 3)


def test_extends_is_relative_to_the_file_and_of_a_list_the_last_wins(write, tmp_path, monkeypatch):
    write(name="shared/run.yaml")
    write("optim: {lr: 5.0, beta1: 0.5}", "shared/optim.yaml")
    child = write("extends: [../shared/run.yaml, ../shared/optim.yaml]\noptim: {beta2: 0.6}", "mine/child.yaml")
    monkeypatch.chdir(tmp_path / "mine")
    optim = load_config(child).optim
    assert (optim.lr, optim.beta1, optim.beta2) == (5.0, 0.5, 0.6)


def test_one_file_may_be_extended_along_two_ways(write):
    write()
    write("extends: run.yaml\nrun: {steps: 1}", "left.yaml")
    write("extends: run.yaml\noptim: {lr: 0.5}", "right.yaml")
    config = load_config(write("extends: [left.yaml, right.yaml]", "child.yaml"))
    assert config.optim.lr == 0.5


def test_a_circle_of_extends_is_named(write, violations):
    write("extends: b.yaml", "a.yaml")
    write("extends: c.yaml", "b.yaml")
    write("extends: b.yaml", "c.yaml")
    (sentence,) = violations(write("extends: b.yaml", "a.yaml"))
    assert "circle" in sentence
    assert "b.yaml" in sentence
    assert "c.yaml" in sentence
    assert "a.yaml" not in sentence


def test_overrides_are_yaml_values(write):
    config = load_config(
        write(),
        ["run.steps=7", "run.name='007'", "optim.lr=1e-4", "rollout.n_train=null", "model.path=a=b, c", "eval.sets={}"],
    )
    assert (config.run.steps, config.run.name, config.optim.lr) == (7, "007", 1e-4)
    assert config.rollout.n_train is None
    assert config.model.path == "a=b, c"


def test_an_override_may_be_a_section(write):
    config = load_config(write(), ["algorithm.kl={coef: 0.1, estimator: k2}", "algorithm.kl.place=reward"])
    assert config.algorithm.kl.model_dump() == {
        "coef": 0.1, "estimator": "k2", "place": "reward", "reference": "start",
    }  # fmt: skip


def test_another_reward_by_override_starts_from_its_own_defaults_but_keeps_the_weight(write):
    term = load_config(write(), ["reward.terms.main.name=majority_vote"]).reward.terms["main"]
    assert (term.name, term.weight, term.normalize, term.options) == ("majority_vote", 0.5, False, {})


def test_another_reward_in_a_child_starts_from_its_own_defaults_too(write):
    write()
    child = write("extends: run.yaml\nreward: {terms: {main: {name: majority_vote}}}", "child.yaml")
    term = load_config(child).reward.terms["main"]
    assert (term.name, term.weight, term.normalize, term.options) == ("majority_vote", 0.5, False, {})


@pytest.mark.parametrize("order", [1, -1])
def test_options_given_with_the_new_name_are_kept_in_whatever_order(write, order):
    overrides = ["reward.terms.main.name=token_entropy", "reward.terms.main.aggregation=mean"][::order]
    term = load_config(write(), overrides).reward.terms["main"]
    assert (term.name, term.options, term.weight) == (
        "token_entropy",
        {"aggregation": "mean", "span": "all", "empty": None},
        0.5,
    )


def test_naming_the_same_reward_again_keeps_its_options(write):
    term = load_config(write(), ["reward.terms.main.name=trajectory_entropy"]).reward.terms["main"]
    assert (term.normalize, term.options) == (True, {"aggregation": "sum", "span": "all", "empty": None})


def test_null_deletes_a_term(write):
    write()
    child = write(
        "extends: run.yaml\nreward: {terms: {main: null, vote: {name: majority_vote}}}",
        "child.yaml",
    )
    assert list(load_config(child).reward.terms) == ["vote"]


def test_null_for_a_term_that_is_not_there_is_a_mistake(write, violations):
    sentences = violations(write(), ["reward.terms.mian=null"])
    assert sentences == ["reward.terms.mian = null: there is no such entry to delete. Did you mean reward.terms.main?"]


def test_another_task_starts_from_its_own_settings(write, violations):
    write()
    middle = write("extends: run.yaml\ndata: {train: {settings: {digits: 4}}}", "middle.yaml")
    assert load_config(middle).data.train.settings["digits"] == 4  # type: ignore[union-attr]
    (sentence,) = violations(middle, ["data.train.task=chain_summ"])
    assert "Did you mean chain_sum?" in sentence  # and nothing about digits, which went with the old task


def test_a_file_may_take_the_place_of_a_task_and_keep_the_sampling_of_the_set(write):
    base = write()
    held_out = "eval: {every: 1, sets: {h: {task: chain_sum, size: 9, samples: 7}}}"
    write(f"extends: {base.name}\n{held_out}", "child.yaml")
    grandchild = write(
        "extends: child.yaml\ndata: {train: {path: t.jsonl}}\neval: {sets: {h: {path: e.jsonl}}}", "grandchild.yaml"
    )
    config = load_config(grandchild)
    assert isinstance(config.data.train, JsonlSource)
    assert isinstance(config.eval.sets["h"], JsonlSource)
    assert config.eval.sets["h"].samples == 7
    back = load_config(grandchild, ["data.train={task: chain_sum, size: 3}"])
    assert isinstance(back.data.train, TaskSource)


def test_defaults_of_open_options_are_filled_in(write):
    resolved = to_yaml(load_config(write()))
    assert "answer_width: 1" in resolved  # the task's
    assert "aggregation: sum" in resolved  # the reward's


def test_the_folder_of_a_run_stands_for_its_config(write, tmp_path):
    path = write(name="runs/x/config.yaml")
    assert load_config(path.parent).run.name == "small"


def test_the_folder_of_a_run_is_its_run_dir_wherever_it_was_moved(write, tmp_path):
    """Else a copy would be measured, and written to, in the place of the original."""
    path = write(name="runs/moved/config.yaml")
    assert load_config(path).run.dir != str(path.parent)
    assert load_config(path.parent).run.dir == str(path.parent)
    assert load_config(path.parent, ["run.dir=elsewhere"]).run.dir == "elsewhere"
    written = tmp_path / "runs/./moved"
    path.write_text(to_yaml(load_config(path, [f"run.dir={written}/"])))
    assert load_config(path.parent) == load_config(path)  # one place, however it is spelt


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("run: {name: x", "not valid YAML (line"),
        ("run: {name: x}\nrun: {name: y}", "duplicate key"),
        ("- run", "a config is a mapping of sections"),
        ("run: {1: x}", "has the key 1, which is no text"),
        ("extends: 3", "must be a file or a list of files"),
        ("extends: rum.yaml", "rum.yaml. Did you mean"),
    ],
)
def test_what_cannot_be_read_is_said_in_a_sentence(write, text, said, violations):
    write()
    (sentence,) = violations(write(text, "bad.yaml"))
    assert said in sentence


def test_a_missing_file_is_named_with_its_nearest_neighbour(write, tmp_path, violations):
    write(name="quickstart.yaml")
    (sentence,) = violations(tmp_path / "quikstart.yaml")
    assert sentence.endswith(f"Did you mean {tmp_path}/quickstart.yaml?")


def test_nothing_is_interpolated_or_evaluated(write, monkeypatch, violations):
    monkeypatch.setenv("SECRET", "told")
    text = "extends: run.yaml\nrun: {name: '${oc.env:SECRET}', dir: '${run.name}'}"
    write()
    sentences = violations(write(text, "child.yaml"))
    assert len(sentences) == 2
    assert all("interpolation (${...}) is not supported" in sentence for sentence in sentences)
    assert not any("told" in sentence for sentence in sentences)
    (sentence,) = violations(write(), ["run.dir=${oc.env:SECRET}"])
    assert "interpolation (${...}) is not supported" in sentence


def test_yaml_tags_that_build_objects_are_refused(write, violations):
    (sentence,) = violations(write("run: !!python/object/apply:os.system [true]", "bad.yaml"))
    assert "not valid YAML" in sentence


@pytest.mark.parametrize("override", ["run.steps", "=5", "run..steps=5", ".run=5", "--run.steps=5", "run steps=5"])
def test_what_is_no_override_is_refused(override):
    with pytest.raises(ValueError, match=r"is no override: write key\.path=value, such as run\.steps=50\."):
        parse_override(override)


@pytest.mark.parametrize(
    ("override", "said"),
    [("run.name=", "write run.name=null for null"), ("run.name=[", "not valid YAML"), ("run={1: 2}", "no text")],
)
def test_an_override_needs_a_readable_value(override, said):
    with pytest.raises(ValueError, match=said):
        parse_override(override)


def test_an_override_goes_through_no_scalar(write, violations):
    (sentence,) = violations(write(), ["run.steps.x=1"])
    assert sentence == "run.steps.x=1: run.steps is 10, not a section. Set it whole: run.steps=value."


@pytest.mark.parametrize(
    ("text", "model"),
    [("runs: {}", StudyConfig), ("snapshots: {}", PretrainConfig), ("run: {}", Config)],
)
def test_the_kind_of_a_config_shows_in_its_sections(write, text, model):
    assert model_of(write(text, "any.yaml")) is model


def test_a_layer_that_turns_something_off_turns_off_what_was_said_of_it(write):
    judge = "{name: judge, weights: servers, pool: large, max_new_tokens: 4}"
    lower = [
        "algorithm: {kl: {coef: 0.1, estimator: k2, place: reward}, correction: {method: mask, low: 0.8, high: 1.5}}",
        f"reward: {{terms: {{main: {{name: self_verification}}}}, providers: {{j: {judge}}}}}",
        "servers: {pools: {policy: {}, large: {model: bases/large}}}",
    ]
    write("extends: run.yaml\n" + "\n".join(lower), "strict.yaml")
    write()
    given = load_config(write("extends: strict.yaml", "same.yaml"))
    assert (given.algorithm.kl.estimator, given.algorithm.correction.low) == ("k2", 0.8)
    assert given.reward.providers["j"].options["pool"] == "large"
    off = ["algorithm.kl.coef=0", "algorithm.correction.method=truncate", "reward.providers.j.weights=policy"]
    loose = load_config(write("extends: strict.yaml", "loose.yaml"), off)
    assert loose.algorithm.kl == type(loose.algorithm.kl)()
    assert (loose.algorithm.correction.low, loose.algorithm.correction.high) == (0.5, 1.5)
    assert loose.reward.providers["j"].options["pool"] == "judge"
    assert load_config(write(to_yaml(loose), "resolved.yaml")) == loose
