"""`urlvr plan` as a user calls it: its pages, its refusals, its search."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import write_qwen2

from megatron_urlvr import cli
from megatron_urlvr.config.loader import load_config
from megatron_urlvr.launch.plan.crew import crew_of
from megatron_urlvr.launch.plan.hardware import GPUS, assume
from megatron_urlvr.launch.plan.plan import Model, load_model, make_plan
from megatron_urlvr.launch.plan.search import search

CONFIG = """
run: {{name: small, dir: runs/small, steps: 10, seed: 3}}
model: {{path: {model}}}
data: {{max_prompt_tokens: 16, train: {{task: chain_sum, size: 64}}}}
rollout: {{engine: sglang, prompts: 8, n_votes: 4, max_new_tokens: 64}}
reward: {{terms: {{main: {{name: self_certainty, aggregation: mean}}}}}}
optim: {{lr: 1.0e-3}}
parallel: {{dp: 2, tp: 2, pp: 2, max_tokens_per_microbatch: 128}}
servers: {{pools: {{policy: {{context: 128, tp: 2, count: 4}}}}}}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("plan")
    model = write_qwen2(root / "model", vocab_size=128, layers=4, tokenizer=False)
    path = root / "config.yaml"
    path.write_text(CONFIG.format(model=model))
    return path


@pytest.fixture
def urlvr(monkeypatch, capsys):
    """`urlvr("plan", path, ...)` -> (exit code, output, errors)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["urlvr", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call


def test_the_page_and_the_json_say_the_same(urlvr, config):
    code, page, _ = urlvr("plan", config, "--gpus", 16)
    assert code == 0
    code, text, _ = urlvr("plan", config, "--gpus", 16, "--json")
    told = json.loads(text)
    assert code == 0
    assert f"{told['model']['parameters']:,} parameters" in page
    assert told["gpus"] == {"total": 16, "train": 8, "serve": 8, "servers": 4}
    assert told["seconds"]["total"] == pytest.approx(
        sum(told["seconds"][phase] for phase in ("generate", "score", "train", "sync"))
    )
    assert [rank["pp_ranks"] for rank in told["ranks"]] == [[0], [1]]
    hours = told["seconds"]["total"] * 16 / 3600
    assert told["gpu_hours"] == {"step": pytest.approx(hours), "run": pytest.approx(10 * hours)}
    assert f"{hours:9.2f}   a step on 16 GPUs" in page
    assert " x cp " not in page
    for name in told["assumptions"]:
        assert f"  {name} = " in page


def test_an_assumption_can_be_replaced_and_moves_what_rests_on_it(urlvr, config):
    slow = json.loads(urlvr("plan", config, "--gpus", 16, "--json", "--assume", "compute_efficiency=0.3")[1])
    fast = json.loads(urlvr("plan", config, "--gpus", 16, "--json", "--assume", "compute_efficiency=0.6")[1])
    assert slow["seconds"]["train"] > fast["seconds"]["train"]
    assert slow["seconds"]["sync"] == fast["seconds"]["sync"]
    code, _, err = urlvr("plan", config, "--assume", "compute_eficiency=0.3")
    assert code == 2
    assert "Did you mean compute_efficiency?" in err


def test_context_parallelism_is_named_and_asked_why(urlvr, config):
    code, page, _ = urlvr("plan", config, "parallel.cp=2", "--gpus", 24)
    assert code == 0
    assert "16 train, 8 serve" in page
    assert "dp 2 x tp 2 x pp 2 x cp 2, " in page
    assert "micro-batches of 128 tokens over 2 ranks" in page
    assert "passed around a ring" in page
    assert "parallel.cp = 2 is not needed" in page
    code, page, _ = urlvr("plan", config, "parallel.cp=4", "parallel.tp=2", "parallel.share_prefix=true", "--gpus", 40)
    assert "gathered (our own attention" in page
    code, page, _ = urlvr("plan", config, "parallel.cp=8", "parallel.pp=1", "parallel.dp=1", "--gpus", 24)
    assert "keys and values of every layer use the network" in page
    code, _, err = urlvr("plan", config, "parallel.cp=64", "--gpus", 520)
    assert code == 2
    assert "cuts every sequence into 128 stretches, and the longest has 79 tokens" in err


def test_a_search_spreads_sequences_where_they_fit_no_other_way(config):
    long = [
        "rollout.engine=embedded",
        "rollout.max_new_tokens=32768",
        "parallel.tp=1",
        "parallel.pp=1",
        "parallel.dp=auto",
        "servers.bucket_mb=1",  # else the sync takes more than the sequences
    ]
    loaded = load_model(load_config(config, long))
    undivided = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    model = Model({**loaded.hf, **undivided, "max_position_embeddings": 1 << 20}, loaded.family)
    gpu, peak = GPUS["H100-80GB"], {}
    for cp in (1, 2):
        layout = load_config(config, [*long, f"parallel.cp={cp}", "model.recompute=full"])
        plan = make_plan(layout, model, gpu, crew_of(layout, 2, None), assume([]), built=False)
        peak[cp] = plan.ranks[0].peak
    for memory, cp in ((sum(peak.values()) // 2, 2), (peak[1] + (1 << 20), 1)):
        best = search(load_config(config, long), model, replace(gpu, memory=memory), 2, assume([]))[0]
        assert best.plan.config.parallel.cp == cp
        assert f"parallel.cp={cp}" in best.overrides


def test_generation_beside_training_takes_the_longer_of_the_two(urlvr, config):
    stale = ("rollout.max_staleness=1", "algorithm.correction.old_logp=rollout")
    told = json.loads(urlvr("plan", config, *stale, "--gpus", 16, "--json")[1])["seconds"]
    assert told["total"] == pytest.approx(max(told["generate"], told["score"] + told["train"]) + told["sync"])


def test_a_layout_that_cannot_work_is_refused_with_every_reason(urlvr, config):
    code, out, err = urlvr("plan", config, "parallel.tp=3", "parallel.pp=3", "servers.pools.policy.tp=3", "--gpus", 26)
    assert code == 2
    assert out == ""
    for reason in ("parallel.tp = 3 does not divide", "parallel.pp = 3 does not divide", "servers.pools.policy.tp = 3"):
        assert reason in err


def test_what_does_not_fit_is_said_with_figures_and_ends_with_code_2(urlvr, config):
    code, out, _ = urlvr("plan", config, "--gpus", 16, "--assume", "trainer_reserve_gib=90")
    assert code == 2
    assert "Does not fit:" in out
    assert "model.recompute=full" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--gpu", "H100"), "Did you mean H100-80GB?"),
        (("--search",), "--search needs --gpus"),
        (("--gpus", 8), "the servers 0"),
        (("model.path=/nowhere",), "no such folder"),
    ],
)
def test_what_cannot_be_planned_is_a_sentence(urlvr, config, arguments, sentence):
    code, _, err = urlvr("plan", config, *arguments)
    assert code == 2
    assert sentence in err


def test_a_search_proposes_overrides_that_plan_to_the_seconds_it_promised(urlvr, config):
    code, text, _ = urlvr("plan", config, "--gpus", 16, "--search", "--json")
    assert code == 0
    found = json.loads(text)
    best, first = found["best"], found["layouts"][0]
    assert [each["seconds"] for each in found["layouts"]] == sorted(each["seconds"] for each in found["layouts"])
    again = json.loads(urlvr("plan", config, *first["overrides"], "--gpus", 16, "--json")[1])
    assert again["seconds"] == best["seconds"]
    assert again["gpus"]["serve"] == first["serve"]


@pytest.mark.parametrize(
    ("overrides", "gpus", "rollout", "shares"),
    [
        ([], None, None, (8, 8)),
        ([], 24, None, (8, 16)),
        (["parallel.dp=auto"], 24, None, (16, 8)),
        (["parallel.dp=auto"], 24, 16, (8, 16)),
        (["rollout.engine=embedded"], None, None, (8, 0)),
    ],
)
def test_gpus_are_shared_out_between_training_and_serving(config, overrides, gpus, rollout, shares):
    crew = crew_of(load_config(config, overrides), gpus, rollout)
    assert (crew.trainers, crew.serving) == shares


@pytest.mark.parametrize(
    ("overrides", "whole", "parts"),
    [
        ([], 0, 0),
        (["optim.ema_decay=0.9"], 0, 1),
        (["optim.ema_decay=0.9", "parallel.distributed_optimizer=false"], 1, 0),
        (["reward.judge=reference"], 1, 0),
        (["reward.judge=ema", "optim.ema_decay=0.9"], 0, 1),
        (["reward.judge=reference", "optim.ema_decay=0.9"], 1, 1),
    ],
)
def test_every_copy_of_the_weights_that_a_run_keeps_is_planned(urlvr, config, overrides, whole, parts):
    """The reference is whole on every rank; of the average a rank keeps what it steps, as replicas do together."""
    told = json.loads(urlvr("plan", config, "--gpus", 16, "--json", "eval.every=0", *overrides)[1])
    copies = whole + parts / told["layout"]["dp"]
    assert told["host_bytes"] == copies * 4 * max(rank["parameters"] for rank in told["ranks"])
