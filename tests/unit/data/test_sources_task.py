import pytest

from megatron_urlvr.config.data import TaskSource
from megatron_urlvr.data.errors import DataError
from megatron_urlvr.data.grading.annotate import annotate
from megatron_urlvr.data.labels import LabelStore
from megatron_urlvr.data.sources import load_source
from megatron_urlvr.data.tasks import get_task
from megatron_urlvr.data.tokenizer import character_tokenizer
from megatron_urlvr.types import Group, Sample


def load(source=None, *, name="train", labels=None, tokenizer=None, **changes):
    arguments = {"split": "train", "seed": 0, "max_prompt_tokens": 7, "overlong": "refuse", **changes}
    return load_source(
        source or TaskSource(task="chain_sum", size=50),
        name=name,
        tokenizer=tokenizer or get_task("chain_sum").tokenizer(),
        labels=LabelStore() if labels is None else labels,
        **arguments,
    )


def test_labels_go_to_the_store_and_nowhere_else():
    labels = LabelStore()
    loaded = load(labels=labels)
    assert len(labels) == 50
    for prompt in loaded.prompts:
        digits = prompt.text[:-1]
        assert labels.get(prompt.id, use="audit") == str(sum(map(int, digits)) % 10)
        backwards = f"{digits[::-1]}="
        tokens = get_task("chain_sum").tokenizer()(backwards)["input_ids"]
        assert prompt.fields == {"digits": digits, "paraphrase": backwards, "paraphrase_tokens": tokens}
        assert len(prompt.tokens) == 7


def test_ids_name_the_set_and_the_place_in_the_sequence():
    skipped = load(TaskSource(task="chain_sum", size=3, skip=10), name="probe")
    whole = load(TaskSource(task="chain_sum", size=13), name="probe")
    assert [p.id for p in skipped.prompts] == ["probe/10", "probe/11", "probe/12"]
    assert skipped.prompts == whole.prompts[10:]


def test_the_sources_own_seed_wins_over_the_runs():
    own = TaskSource(task="chain_sum", size=20, seed=3)
    assert load(own, seed=0).prompts == load(own, seed=1).prompts
    assert load(seed=0).prompts != load(seed=1).prompts


def test_a_source_may_take_the_other_side_and_then_it_is_the_set_that_is_evaluated():
    tested = load(TaskSource(task="chain_sum", size=20), split="held_out")
    trained = load(TaskSource(task="chain_sum", size=20, split="held_out", seed=0), seed=7)
    assert [prompt.text for prompt in trained.prompts] == [prompt.text for prompt in tested.prompts]
    others = load(TaskSource(task="chain_sum", size=20, split="train"), split="held_out")
    assert others.prompts == load(TaskSource(task="chain_sum", size=20)).prompts


def test_the_fingerprint_is_of_the_content():
    assert load(name="a").fingerprint == load(name="b").fingerprint
    assert load(seed=1).fingerprint != load(seed=0).fingerprint
    wide = TaskSource(task="chain_sum", size=50, settings={"answer_width": 2})
    assert load(wide).fingerprint != load().fingerprint


def test_a_prompt_longer_than_the_limit_is_refused_by_name():
    with pytest.raises(DataError, match=r"'train/0' has 7 tokens and data\.max_prompt_tokens is 6"):
        load(max_prompt_tokens=6)


def test_filtering_everything_away_is_refused():
    with pytest.raises(DataError, match="all 50 are longer than max_prompt_tokens = 6"):
        load(max_prompt_tokens=6, overlong="filter")


def test_a_tokenizer_without_the_tasks_characters_is_refused():
    with pytest.raises(DataError, match="cannot encode the prompts"):
        load(tokenizer=character_tokenizer("abc$", eos="$"))


def test_annotation_reads_answers_and_classes_and_knows_what_was_cut_off():
    loaded = load()
    texts = [("c#3", "stop"), ("#5", "stop"), ("#3", "stop"), ("#?", "stop"), ("#3", "length"), ("mm", "stop")]
    samples = [
        Sample(prompt_id=loaded.prompts[0].id, index=i, tokens=[], text=text, finish=finish)
        for i, (text, finish) in enumerate(texts)
    ]
    group = Group(prompt=loaded.prompts[0], samples=samples)
    annotate([group], lambda prompt: loaded.grader)
    assert group.answers == ["3", "5", "3", "?", None, None]
    assert group.classes == [0, 1, 0, 3, None, None]
