"""Every violation at once, each a sentence that names the setting, its value, what is allowed, what was meant."""

from __future__ import annotations

import re

import pytest

from megatron_urlvr.config.errors import ConfigError
from megatron_urlvr.config.loader import load_config
from megatron_urlvr.config.pretrain import PretrainConfig


def test_all_violations_of_all_kinds_are_listed_together(write, violations):
    sentences = violations(
        write(),
        [
            "run.stepz=5",  # unknown key
            "run.seed=many",  # wrong type
            "optim.lr=-1",  # out of range
            "model.dtype=float23",  # no such choice
            "rollout.n_train=9",  # against n_votes
            "algorithm.mini_batch=3",  # against rollout.prompts, in another section
            "reward.terms.main.agregation=sum",  # unknown option of a reward
            "reward.terms.aux.name=majority_vot",  # unknown name
            "data.train.settings.digits=1",  # setting of a task
            "parallel.sequence_parallel=true",  # without tp
        ],
    )
    assert [sentence.split(" ")[0] for sentence in sentences] == [
        "run.seed",
        "run.stepz",
        "model.dtype",
        "data.train.settings.digits",
        "rollout:",
        "reward.terms.main.agregation",
        "reward.terms.aux.name",
        "optim.lr",
        "parallel:",
        "algorithm.mini_batch",
    ]
    assert all(sentence.endswith((".", "?")) for sentence in sentences)


def test_the_error_speaks_of_the_file_and_not_of_pydantic(write):
    path = write()
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["run.steps=many", "foo=1"])
    text = str(caught.value)
    assert text.startswith(f"{path}: 2 violations.\n  - run.steps = 'many': must be an integer, at least 0.\n")
    assert not re.search(r"pydantic|https?://|Input should|value_error|type=", text)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("run.device=gpu", "run.device = 'gpu': must be one of 'auto', 'cpu', 'cuda'."),
        ("run.device=cud", "run.device = 'cud': must be one of 'auto', 'cpu', 'cuda'. Did you mean cuda?"),
        ("parallel.dp=0", "parallel.dp = 0: must be 'auto' or an integer, at least 1."),
        ("parallel.dp=aut", "parallel.dp = 'aut': must be 'auto' or an integer, at least 1. Did you mean auto?"),
        ("rollout.n_train=x", "rollout.n_train = 'x': must be an integer, at least 1 or null."),
        ("run.steps=true", "run.steps = true: must be an integer, at least 0."),
        ("run.steps=1.5", "run.steps = 1.5: must be an integer, at least 0."),
        ("run.steps='5'", "run.steps = '5': must be an integer, at least 0."),
        ("data.shuffle=1", "data.shuffle = 1: must be true or false."),
        ("run.name=5", "run.name = 5: must be text, not empty, matching ^[A-Za-z0-9][A-Za-z0-9._-]*$."),
        ("optim.lr=.inf", "optim.lr = inf: must be a number, above 0."),
        ("optim.weight_decay=.nan", "optim.weight_decay = nan: must be a number, at least 0."),
        ("rollout=3", "rollout = 3: must be a section ("),
        ("reward.terms={}", None),
        ("reward.terms.main=null", "reward.terms is empty: it must be a mapping from names to sections ("),
        ("optimm.lr=1", "optimm = {'lr': 1}: no such setting. Did you mean optim? Known at the top: run,"),
        ("algorithm.advantage=grop", "algorithm.advantage = 'grop': there is no such advantage. Did you mean grpo?"),
        ("data.train.task=chain_sun", "data.train.task = 'chain_sun': there is no such task. Did you mean chain_sum?"),
        (
            "data.train.settings.digts=3",
            "data.train.settings.digts = 3: no such setting. Did you mean data.train.settings.digits? Known in ",
        ),
        (
            "data.train.settings.styles.carefull=3",
            "data.train.settings.styles.carefull = 3: no such setting. Did you mean data.train.settings.styles.c",
        ),
    ],
)
def test_each_violation_is_a_sentence_of_its_own(write, override, sentence, violations):
    if sentence is None:
        assert load_config(write(), [override])  # an empty mapping merges: nothing changes
        return
    found = violations(write(), [override])
    assert len(found) == 1
    assert found[0].startswith(sentence)


def test_a_missing_section_is_said_once_with_what_it_holds(write, violations):
    sentences = violations(write("run: {name: x, dir: y, steps: 1, seed: 0}\nmodel: {}", "bad.yaml"))
    assert sentences[0] == "model.path is missing: it must be text, not empty."
    assert [sentence.split(" ")[0] for sentence in sentences] == ["model.path", "data", "rollout", "reward", "optim"]


def test_a_mistyped_entry_of_a_mapping_is_met_with_the_entry_that_was_meant(write, violations):
    (sentence,) = violations(write(), ["reward.terms.mian.weight=2"])
    assert sentence == "reward.terms.mian.name is missing: it must be text. Did you mean reward.terms.main?"


def test_rules_are_not_asked_about_values_that_are_invalid_themselves(write, violations):
    sentences = violations(write(), ["rollout.n_votes=none", "rollout.n_train=99", "algorithm.mini_batch=5"])
    assert len(sentences) == 2
    assert sentences[0].startswith("rollout.n_votes = 'none'")
    assert sentences[1].startswith("algorithm.mini_batch = 5 does not divide rollout.prompts = 8")


def test_a_broken_rule_of_a_set_does_not_make_the_set_disappear(write, violations):
    text = "extends: run.yaml\neval: {every: 5, sets: {h: {task: chain_sum, size: 4, samples: 4, pass_k: [4]}}}"
    write()
    (sentence,) = violations(write(text, "child.yaml"))
    assert sentence == "eval.sets.h: pass_k holds [4]: the unbiased estimate needs 1 <= k < samples = 4."


TURNS = "servers={colocated: true, transport: disk}"
ROUTER = "servers.pools.policy.router='http://127.0.0.1:1'"
DIRECT = "algorithm.loss.name=em_ft"
OLD = "algorithm.correction.old_logp=rollout"


JUDGED = ["reward.terms.main={name: self_verification}", "reward.providers.j={name: judge, max_new_tokens: 4}"]
VOTED = [
    "reward.terms.main={name: co_rewarding}",
    "reward.providers.v={name: votes, of: prompt, weights: reference, samples: 2, max_new_tokens: 4}",
]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["algorithm.mini_batch=3"], "these sizes fit: 1, 2, 4, 8"),
        (["algorithm.kl={coef: 0.1, reference: ema}"], "needs optim.ema_decay, which is null"),
        (["algorithm.kl.reference=ema"], "reference = 'ema' with coef = 0, which turns the penalty off"),
        (["algorithm.kl={estimator: k1, place: reward}"], "estimator = 'k1', place = 'reward' with coef = 0"),
        (["algorithm.correction={method: truncate, low: 0.9}"], "low = 0.9 with method = 'truncate', which reads high"),
        (["algorithm.correction={high: 3}"], "high = 3.0 with method = 'none', which reads no bound: leave it out"),
        ([*JUDGED, "reward.providers.j.pool=other"], "pool = 'other' with weights = 'policy', which asks no pool"),
        ([*VOTED, "reward.providers.v.pool=other"], "pool = 'other' with weights = 'reference', which asks no pool"),
        (["parallel.sequence_parallel=true"], "needs tp above 1"),
        (["rollout.n_train=5"], "n_train = 5 is more than n_votes = 4"),
        (["rollout.n_votes=1"], "rollout.n_votes = 1: grpo compares"),
        (["rollout.n_train=1"], "rollout.n_train = 1: grpo compares"),
        (["rollout.engine=replay"], "needs replay_from"),
        (["rollout.replay_from=runs/x"], "is read by engine: replay alone"),
        (["rollout={engine: replay, replay_from: x}", "run.rollout_only=true"], "what is already recorded"),
        ([TURNS], "which has no servers"),
        ([TURNS, "rollout={engine: sglang, max_staleness: 1}", OLD], "nothing can be generated while the policy"),
        ([TURNS, "rollout.engine=sglang", "run.rollout_only=true"], "nothing trains that memory could be for"),
        (["servers.colocated=true", "rollout.engine=sglang"], "NCCL refuses two processes on one GPU"),
        ([TURNS, "rollout.engine=sglang", "servers.pause=in_place"], "servers drop their cache when they sleep"),
        ([TURNS, "rollout.engine=sglang", ROUTER], "a router does not know that servers sleep"),
        (["optim={min_lr: 1, schedule: linear}"], "min_lr = 1.0 is above lr = 0.001"),
        (["optim.min_lr=1e-5"], "min_lr = 1e-05 with schedule = 'constant', which never falls to it"),
        (["optim.schedule_steps=5"], "schedule_steps = 5 with schedule = 'constant', which has no horizon"),
        (
            [DIRECT, "algorithm.kl={coef: 0.1, place: reward}"],
            "kl.coef = 0.1 and kl.place = 'reward' with loss.name = ",
        ),
        ([DIRECT, "algorithm.entropy_scaling=true"], "entropy_scaling = true with loss.name = 'em_ft'"),
        (
            [DIRECT, "algorithm.advantage=rloo"],
            "advantage = 'rloo' with loss.name = 'em_ft', which trains on no reward",
        ),
        (["eval.every=5"], "there are no sets to evaluate"),
        (["eval.sets.h={path: x, label_field: null}"], "an evaluation set needs labels"),
        (["data.train={path: x, plain_template: q}"], "must contain the placeholder {prompt}"),
        (["data.train={path: x, grading: {extract: regex}}"], "extract: regex needs pattern"),
        (["data.train={path: x, grading: {extract: regex, pattern: '(a)(b)'}}"], "has 2 groups"),
        (["data.train={path: x, grading: {extract: regex, pattern: '(a'}}"], "is no regular expression"),
        (["data.train={path: x, grading: {pattern: '(a)'}}"], "read under extract: regex alone"),
    ],
)
def test_settings_that_contradict_each_other_are_named_together(write, overrides, said, violations):
    (sentence,) = violations(write(), overrides)
    assert said in sentence


@pytest.mark.parametrize(
    ("snapshot", "said"),
    [
        ("{}", "give one of the two"),
        ("{step: 1, maj_at_least: 0.5}", "give one of the two"),
        ("{step: 1, maj_at_most: 0.5}", "give maj_at_least too"),
        ("{maj_at_least: 0.5, maj_at_most: 0.4}", "must be above maj_at_least = 0.5"),
    ],
)
def test_a_snapshot_is_taken_in_one_way(write, snapshot, said, violations):
    path = write(
        f"""
        run: {{name: b, dir: bases/b, seed: 0, steps: 5}}
        data: {{task: chain_sum, max_new_tokens: 16}}
        optim: {{lr: 1e-3}}
        snapshots: {{weak: {snapshot}}}
        """,
        "pretrain.yaml",
    )
    (sentence,) = violations(path, model=PretrainConfig)
    assert sentence.startswith("snapshots.weak: ")
    assert said in sentence


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.heads=3", "model.kv_heads=3"], "heads = 3 does not divide hidden = 64"),
        (["model={hidden: 12, heads: 4, kv_heads: 4}"], "makes heads 3 wide"),
        (["model.kv_heads=3"], "kv_heads = 3 does not divide heads = 4"),
        (["run.steps=5"], "snapshots early: their step is after the last one, run.steps = 5"),
        (["snapshots.early=null"], "snapshots is empty"),
    ],
)
def test_a_base_policy_that_cannot_be_made_is_refused(write, violations, overrides, said):
    path = write(
        """
        run: {name: b, dir: bases/b, seed: 0, steps: 9}
        data: {task: chain_sum, max_new_tokens: 16}
        optim: {lr: 1e-3}
        snapshots: {early: {step: 6}}
        """,
        "pretrain.yaml",
    )
    (sentence,) = violations(path, overrides, PretrainConfig)
    assert said in sentence


def test_assignment_is_validated_like_a_file(write):
    config = load_config(write())
    with pytest.raises(ValueError):
        config.run.steps = -1
    with pytest.raises(ValueError):
        config.rollout.n_train = 99
