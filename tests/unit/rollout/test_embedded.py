"""The embedded engine against transformers: its tokens, its log-probs, its distribution, and what may not matter."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_sampling import fits
from tiny_models import hf_logits, hf_model, stats_of_logits, write_qwen2

from megatron_urlvr.policy.batch import Row
from megatron_urlvr.rollout import embedded
from megatron_urlvr.rollout.embedded import EmbeddedEngine
from megatron_urlvr.types import Group, Prompt, Sample, Sampling

VOCAB = 29
STOP = frozenset({3, 11, 17, 20})
RAGGED = [
    Prompt(f"train/{i}", "", tokens)
    for i, tokens in enumerate(
        [(5,), (1, 2, 3, 4, 5, 6, 7), (8, 9), (9, 8, 7, 1, 2), (4, 4, 4, 4, 4, 4, 4), (13, 12, 2)]
    )
]
MakeEngine = Callable[..., EmbeddedEngine]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("engine")
    return {"untied": write_qwen2(root / "a", seed=4), "tied": write_qwen2(root / "b", tied=True, seed=5)}


@pytest.fixture(scope="module")
def make(folders: dict[str, Path]) -> MakeEngine:
    def make(name: str = "untied", *, vocab_size: int = VOCAB, max_batch: int = 64, stop=STOP) -> EmbeddedEngine:
        engine = EmbeddedEngine(
            folder=str(folders[name]),
            decode=lambda tokens: " ".join(map(str, tokens)),
            stop_ids=stop,
            device=torch.device("cpu"),
            dtype=torch.float32,
            vocab_size=vocab_size,
            max_batch=max_batch,
        )
        engine.begin_update(1)
        engine.update(load_file(folders[name] / "model.safetensors").items())
        engine.end_update()
        return engine

    return make


def samples(groups: list[Group]) -> dict[tuple[str, int], Sample]:
    return {(sample.prompt_id, sample.index): sample for group in groups for sample in group.samples}


def run(engine: EmbeddedEngine, prompts=RAGGED, **sampling) -> dict[tuple[str, int], Sample]:
    settings = {"n": 4, "max_new_tokens": 12, "temperature": 1.0, "seed": 5, **sampling}
    return samples(list(engine.generate(prompts, Sampling(**settings))))


# -- against transformers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_greedy_decoding_of_a_ragged_batch_is_what_transformers_generates_for_each_prompt(make, folders, name: str):
    found = run(make(name), n=1, temperature=0.0)
    model = hf_model(folders[name], torch.float32)
    for prompt in RAGGED:
        ids = torch.tensor([prompt.tokens])
        out = model.generate(
            ids, do_sample=False, max_new_tokens=12, eos_token_id=sorted(STOP), pad_token_id=0,
            attention_mask=torch.ones_like(ids),
        )  # fmt: skip
        assert found[prompt.id, 0].tokens == out[0, len(prompt.tokens) :].tolist()
    if name == "untied":
        assert len({sample.length for sample in found.values()}) > 1


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("name", ["untied", "tied"])
def test_log_probs_are_those_of_a_teacher_forced_forward(make, folders, name: str, temperature: float):
    found = run(make(name), temperature=temperature)
    model = hf_model(folders[name])
    tokens = {prompt.id: prompt.tokens for prompt in RAGGED}
    for sample in found.values():
        with torch.no_grad():
            logits = hf_logits(model, Row(tokens[sample.prompt_id], sample.tokens)) / temperature
        expected = stats_of_logits(logits, sample.tokens)["logp"]
        assert sample.logp is not None
        assert sample.logp.dtype == torch.float32
        assert torch.allclose(sample.logp.double(), expected, rtol=0, atol=1e-5)
    if name == "untied":
        assert len({sample.length for sample in found.values()}) > 4, "rows must leave the batch at different times"
        assert {sample.finish for sample in found.values()} == {"stop", "length"}


def test_a_masked_vocabulary_is_never_sampled_and_log_probs_are_normalised_without_it(make, folders):
    found = run(make(vocab_size=21), temperature=1.5, n=16)
    model = hf_model(folders["untied"])
    tokens = {prompt.id: prompt.tokens for prompt in RAGGED}
    for sample in found.values():
        assert max(sample.tokens) < 21
        with torch.no_grad():
            logits = hf_logits(model, Row(tokens[sample.prompt_id], sample.tokens))[:, :21] / 1.5
        expected = stats_of_logits(logits, sample.tokens)["logp"]
        assert sample.logp is not None
        assert torch.allclose(sample.logp.double(), expected, rtol=0, atol=1e-5)
    unmasked = run(make(), temperature=1.5, n=16)
    assert max(max(sample.tokens) for sample in unmasked.values()) >= 21


# -- what is sampled --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_first_tokens_follow_the_softmax(make, folders, temperature: float):
    prompt = RAGGED[3]
    found = run(make(max_batch=5000), [prompt], n=4000, max_new_tokens=1, temperature=temperature)
    counts = torch.bincount(torch.tensor([s.tokens[0] for s in found.values()]), minlength=VOCAB).double()
    with torch.no_grad():
        logits = hf_logits(hf_model(folders["untied"]), Row(prompt.tokens, [0]))[0]
    assert fits(counts, (logits / temperature).softmax(-1))
    assert not fits(counts, (logits / (temperature * 1.5)).softmax(-1))


def test_pairs_of_tokens_follow_the_softmax_of_each_given_the_one_before(make, folders):
    """Were the draws of two positions related, pairs would be off though each token alone were right."""
    prompt, width = RAGGED[3], 6
    engine = make(max_batch=8000, vocab_size=width, stop=frozenset({28}))
    found = run(engine, [prompt], n=6000, max_new_tokens=2)
    counts = torch.zeros(width, width, dtype=torch.float64)
    for sample in found.values():
        counts[sample.tokens[0], sample.tokens[1]] += 1
    model = hf_model(folders["untied"])
    joint = torch.zeros(width, width, dtype=torch.float64)
    with torch.no_grad():
        for first in range(width):
            logits = hf_logits(model, Row(prompt.tokens, [first, 0]))[:, :width]
            joint[first] = logits[0].softmax(-1)[first] * logits[1].softmax(-1)
    assert float(joint.sum()) == pytest.approx(1.0)
    assert fits(counts.reshape(-1), joint.reshape(-1))
    independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    assert not fits(counts.reshape(-1), independent.reshape(-1))


def test_top_p_cuts_the_tail_and_reports_log_probs_from_before_the_cut(make, folders):
    prompt, top_p = RAGGED[1], 0.6
    found = run(make(max_batch=5000), [prompt], n=3000, max_new_tokens=1, top_p=top_p)
    with torch.no_grad():
        logits = hf_logits(hf_model(folders["untied"]), Row(prompt.tokens, [0]))[0]
    p = logits.softmax(-1)
    order = p.argsort(descending=True)
    size = int((p[order].cumsum(0) < top_p).sum()) + 1
    kept = torch.zeros(VOCAB, dtype=torch.float64)
    kept[order[:size]] = p[order[:size]]
    assert 2 <= size < VOCAB
    counts = torch.bincount(torch.tensor([s.tokens[0] for s in found.values()]), minlength=VOCAB).double()
    assert fits(counts, kept / kept.sum())
    for sample in list(found.values())[:50]:
        assert sample.logp is not None
        assert float(sample.logp[0]) == pytest.approx(float(p.log()[sample.tokens[0]]), abs=1e-5)


def test_another_seed_draws_others_and_the_same_seed_the_same(make):
    engine = make()
    once, again, other = run(engine), run(engine), run(engine, seed=6)
    assert all(once[key].tokens == again[key].tokens for key in once)
    assert sum(once[key].tokens != other[key].tokens for key in once) > len(once) / 2


# -- what may not matter ----------------------------------------------------------------------------------------------


def assert_same_samples(found: dict[tuple[str, int], Sample], expected: dict[tuple[str, int], Sample]) -> None:
    for key, sample in found.items():
        assert sample.tokens == expected[key].tokens
        assert sample.finish == expected[key].finish
        own, other = sample.logp, expected[key].logp
        assert own is not None
        assert other is not None
        assert torch.allclose(own, other, rtol=0, atol=1e-5)


def test_what_shares_a_batch_does_not_change_a_samples_tokens(make):
    engine = make()
    expected = run(engine, n=8)
    for prompt in RAGGED:
        assert_same_samples(run(engine, [prompt], n=8), expected)
    assert_same_samples(run(engine, RAGGED[::-1], n=8), expected)
    assert_same_samples(run(engine, RAGGED[2:5], n=8), expected)
    assert_same_samples(run(engine, n=3), expected)


@pytest.mark.parametrize("max_batch", [1, 9, 20, 1000])
def test_the_size_of_a_batch_does_not_change_a_samples_tokens(make, max_batch: int):
    assert_same_samples(run(make(max_batch=max_batch)), run(make()))


@pytest.mark.parametrize("share", [0.0, 0.75, 1.1])
def test_finished_rows_leave_the_batch_and_nothing_changes_for_the_others(make, monkeypatch, share: float):
    engine = make()
    expected = run(engine, n=16)
    sizes = []
    forward = engine._forward

    def counted(ids, cache, attention):
        sizes.append(len(ids))
        return forward(ids, cache, attention)

    monkeypatch.setattr(engine, "_forward", counted)
    monkeypatch.setattr(embedded, "COMPACT_BELOW", share)
    engine.max_batch = 1000
    assert_same_samples(run(engine, n=16), expected)
    assert sizes[0] == len(RAGGED), "a prompt is read once for all its samples"
    steps = sizes[1:]
    assert steps == sorted(steps, reverse=True)
    if share == 0.0:
        assert set(steps) == {16 * len(RAGGED)}
    else:
        assert steps[-1] < steps[0]
    if share > 1:
        alive = [sum(s.length > t for s in expected.values()) for t in range(1, 12)]
        assert steps == [n for n in alive if n]


# -- samples ----------------------------------------------------------------------------------------------------------


def test_a_response_ends_with_its_stop_token_which_is_no_text_or_at_the_limit(make):
    for sample in run(make(), n=16).values():
        stopped = sample.tokens[-1] in STOP
        assert sample.finish == ("stop" if stopped else "length")
        assert not STOP & set(sample.tokens[:-1])
        assert stopped or sample.length == 12
        assert sample.text == " ".join(map(str, sample.tokens[:-1] if stopped else sample.tokens))
        assert sample.version == 1
        assert sample.logp is not None
        assert sample.logp.shape == (sample.length,)


def test_groups_come_in_the_prompts_order_with_their_samples_in_index_order(make):
    groups = list(make(max_batch=8).generate(RAGGED, Sampling(3, 4)))
    assert [group.prompt for group in groups] == RAGGED
    assert all([sample.index for sample in group.samples] == [0, 1, 2] for group in groups)
    assert list(make().generate([], Sampling(3, 4))) == []


# -- weights ----------------------------------------------------------------------------------------------------------


def test_weights_are_copied_and_serve_the_announced_version_once_complete(make, folders):
    engine = make()
    other = load_file(write_qwen2(folders["untied"].parent / "c", seed=9) / "model.safetensors")
    before = run(engine)
    engine.begin_update(7)
    with pytest.raises(AssertionError, match="between begin_update and end_update"):
        next(engine.generate(RAGGED, Sampling(1, 1)))
    engine.update(list(other.items())[:5])
    engine.update(list(other.items())[5:])
    assert engine.version == 1
    engine.end_update()
    moved = run(engine)
    assert engine.version == 7
    assert {sample.version for sample in moved.values()} == {7}
    assert any(moved[key].tokens != before[key].tokens for key in before)
    for tensor in other.values():
        tensor.zero_()
    assert_same_samples(run(engine), moved)


def test_a_tensor_the_model_does_not_have_is_named(make):
    engine = make()
    engine.begin_update(2)
    with pytest.raises(KeyError, match=r"model\.nowhere"):
        engine.update([("model.nowhere", torch.zeros(1))])
