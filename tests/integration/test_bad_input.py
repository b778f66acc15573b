"""What cannot be used ends before anything is written: exit code 2, sentences on standard error, no traceback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from small_runs import TRAIN, Command, Outcome, write_config

from megatron_urlvr.data.tokenizer import load_tokenizer, save_tokenizer


@pytest.fixture
def refused(urlvr: Command, config: Path, tmp_path: Path):
    """`refused("optim.lr=-1")` is what standard error says; nothing but an empty, unlocked folder may be left."""

    def _refused(*overrides: object, command: str = "train", file: Path = config) -> str:
        outcome = urlvr(command, file, *overrides)
        assert (outcome.code, outcome.out) == (2, ""), outcome
        assert "Traceback" not in outcome.err
        assert [path.name for path in tmp_path.glob("run/*")] in ([], [".lock"])
        return outcome.err

    return _refused


# -- the config -------------------------------------------------------------------------------------------------------


def test_unknown_keys_and_wrong_types_are_listed_together(refused):
    said = refused("optim.learning_rate=0.1", "rollout.prompts=many", "run.steps=-3", "reward.terms.main.name=entropy")
    assert ": 4 violations." in said
    assert "optim.learning_rate = 0.1: no such setting" in said
    assert "rollout.prompts = 'many'" in said
    assert "run.steps = -3" in said
    assert "token_entropy" in said


def test_layouts_that_the_model_or_the_processes_do_not_allow(refused):
    said = refused("parallel.tp=3", "algorithm.mini_batch=4")
    assert "parallel.tp = 3 does not divide the 4 attention heads" in said
    assert "makes 3 processes a replica, which does not divide the 1 that were started" in said
    assert "parallel.pp = 2" in refused("parallel.pp=2")


def test_a_context_that_is_too_short_for_prompt_and_response(refused):
    said = refused("data.max_prompt_tokens=40", "rollout.max_new_tokens=40")
    assert (
        "data.max_prompt_tokens = 40 and rollout.max_new_tokens = 40 add up to 80, more than the 64 positions" in said
    )


def test_evaluation_during_a_replay_and_sets_without_proper_names(refused, config):
    said = refused("rollout.engine=replay", "rollout.replay_from=elsewhere")
    assert "set eval.every=0" in said
    said = refused('eval.sets={"train": {"task": "chain_sum", "size": 4}, "a/b": {"task": "chain_sum", "size": 4}}')
    assert "sets.train: this name is the training prompts' own" in said
    assert "'a/b' cannot name a set" in said


# -- the model --------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken_base(base: Path, tmp_path: Path) -> Path:
    """A copy of the base, to be broken."""
    return Path(shutil.copytree(base, tmp_path / "base"))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_model_folder_that_is_missing_or_incomplete(refused, broken_base, tmp_path):
    assert f"model.path = {tmp_path}/nowhere: no such folder" in refused(f"model.path={tmp_path}/nowhere")
    path = f"model.path={broken_base}"
    (broken_base / "model.safetensors").rename(tmp_path / "weights")
    assert "only safetensors are read" in refused(path)
    (broken_base / "model.safetensors").write_bytes((tmp_path / "weights").read_bytes()[:1000])
    assert "model.safetensors: cannot be read" in refused(path)
    (broken_base / "tokenizer.json").unlink()
    (broken_base / "tokenizer_config.json").unlink()
    assert "has neither tokenizer.json nor tokenizer_config.json" in refused(path)
    (broken_base / "config.json").write_text("{")
    assert "config.json: not valid JSON" in refused(path)
    (broken_base / "config.json").unlink()
    assert "holds no config.json" in refused(path)


def test_a_model_whose_config_and_weights_differ_or_whose_kind_is_unknown(refused, broken_base):
    path = f"model.path={broken_base}"
    edit_config(broken_base, intermediate_size=128)
    assert "has shape" in refused(path)
    edit_config(broken_base, intermediate_size=64, num_hidden_layers=4)
    assert "is missing" in refused(path)
    edit_config(broken_base, architectures=["MambaForCausalLM"], model_type="mamba")
    assert "MambaForCausalLM" in refused(path)
    (broken_base / "config.json").write_text('{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}')
    assert "its config.json does not say vocab_size, hidden_size, " in refused(path)
    (broken_base / "config.json").write_text("[]")
    assert "config.json: holds a list, an object is expected" in refused(path)


def test_a_tokenizer_that_is_larger_than_the_vocabulary(refused, broken_base):
    tokenizer = load_tokenizer(broken_base)
    tokenizer.add_tokens([f"<extra_{k}>" for k in range(3)])
    save_tokenizer(tokenizer, broken_base)
    said = refused(f"model.path={broken_base}")
    assert "its tokenizer has 24 entries, but its config.json says vocab_size = 21" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(refused):
    assert "run.device = 'cuda', but torch sees no CUDA device" in refused("run.device=cuda")


# -- the data ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def jsonl(base: Path, tmp_path: Path):
    """`jsonl({"prompt": ...}, ...)` is the config of a run on these rows."""

    def _jsonl(*rows: object, **source: object) -> Path:
        data = tmp_path / "data.jsonl"
        data.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        train = {"path": str(data), "grading": {"extract": "hash", "equivalence": "exact"}, **source}
        return write_config(
            tmp_path / "jsonl.yaml",
            {**TRAIN, "eval": {}},
            run={"dir": str(tmp_path / "run")},
            model={"path": str(base)},
            data={"train": train},
            rollout={"prompts": 2},
        )

    return _jsonl


GOOD = [{"prompt": f"{k}{k}{k}=", "answer": str(3 * k % 10)} for k in range(4)]


def test_data_that_is_missing_or_empty(refused, jsonl, tmp_path):
    file = jsonl(*GOOD)
    assert "nowhere.jsonl' does not exist" in refused(f"data.train.path={tmp_path}/nowhere.jsonl", file=file)
    assert "has no rows" in refused(file=jsonl("", "  "))
    assert "is not a file" in refused(f"data.train.path={tmp_path}", file=file)


def test_rows_that_are_no_questions_are_named_by_line(refused, jsonl):
    said = refused(file=jsonl(*GOOD, {"answer": "3"}, "{not json", {"prompt": 7}))
    assert "has 3 unusable rows: line 5 has no prompt" in said
    assert "line 6 is not valid JSON" in said
    assert "line 7 has a int under 'prompt'" in said


def test_a_prompt_that_is_too_long_is_refused_or_filtered(refused, jsonl, urlvr):
    rows = [*GOOD, {"id": "long", "prompt": "1234567890=", "answer": "5"}]
    said = refused(file=jsonl(*rows))
    assert "prompt 'train/5' has 11 tokens and data.max_prompt_tokens is 8" in said
    assert "no prompt of 'train' is left" in refused(
        "data.max_prompt_tokens=2", "data.overlong=filter", file=jsonl(*rows)
    )
    assert urlvr("train", jsonl(*rows), "data.overlong=filter", "run.steps=1").code == 0


def test_fewer_prompts_than_a_step_takes(refused, jsonl):
    said = refused("rollout.prompts=5", file=jsonl(*GOOD))
    assert "data.train holds 4 prompts, but rollout.prompts = 5 different ones make a step" in said
    assert "task 'chain_sum' has" in refused("data.train.size=100000")


def test_a_reward_that_reads_labels_needs_all_of_them(refused, jsonl):
    wanted = "reward.terms.main.name=ground_truth"
    said = refused(wanted, file=jsonl(*GOOD, {"prompt": "123="}))
    assert "data.train has no label for 1 of its 5 prompts, but the reward ground_truth reads labels" in said
    assert "data.train.label_field = null" in refused(wanted, file=jsonl(*GOOD, label_field=None))
    assert "no row of" in refused(wanted, file=jsonl(*GOOD, label_field="solution"))


def test_an_evaluation_set_without_labels(refused, jsonl, tmp_path):
    file = jsonl(*GOOD)
    unlabelled = tmp_path / "unlabelled.jsonl"
    unlabelled.write_text('{"prompt": "123=", "answer": null}\n')
    here = f"eval.sets.test.path={unlabelled}"
    assert "eval.sets.test has no labels, so that nothing can be" in refused(here, "eval.every=1", file=file)
    assert "an evaluation set needs labels" in refused(here, "eval.sets.test.label_field=null", file=file)


def test_text_that_the_tokenizer_cannot_read(refused, jsonl):
    assert "cannot encode the prompts" in refused(file=jsonl({"prompt": "What is 3+4?"}, *GOOD))
    assert "template: chat needs a tokenizer with a chat template" in refused(file=jsonl(*GOOD, template="chat"))


# -- the folders ------------------------------------------------------------------------------------------------------


def test_a_recording_that_is_not_there(refused, tmp_path):
    said = refused("rollout.engine=replay", f"rollout.replay_from={tmp_path}/nothing", "eval.every=0")
    assert f"there are no recorded rollouts in {tmp_path}/nothing/rollouts" in said


def test_a_run_folder_that_cannot_be_made(urlvr, config, tmp_path):
    (tmp_path / "file").touch()
    outcome = urlvr("train", config, f"run.dir={tmp_path}/file/run")
    assert outcome.code == 2
    assert "cannot be made a folder: Not a directory." in outcome.err


def test_a_mistake_that_was_corrected_does_not_stand_in_the_way(urlvr, jsonl, tmp_path):
    assert urlvr("train", jsonl({"prompt": ""})).code == 2
    assert urlvr("train", jsonl(*GOOD), "optim.lr=0.01", "run.steps=1").code == 0


def test_commands_on_folders_that_are_no_runs(urlvr, tmp_path, config):
    def says(*arguments: object) -> str:
        outcome: Outcome = urlvr(*arguments)
        assert (outcome.code, outcome.out) == (2, "")
        return outcome.err

    assert "is no run folder" in says("report", tmp_path)
    assert "holds no runs" in says("runs", tmp_path)
    assert "is no run folder" in says("samples", tmp_path)
    assert "is a folder, and no run's" in says("train", tmp_path)
    assert "--checkpoint step_000002: there is no such checkpoint" in says(
        "eval", config, "--checkpoint", "step_000002"
    )
    assert "eval.sets is empty" in says("eval", config, "eval.every=0", "eval.sets.held_out=null")
