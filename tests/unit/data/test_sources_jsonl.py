import json

import pytest
from tokenizers.processors import TemplateProcessing

from megatron_urlvr.config.data import GradingSection, JsonlSource
from megatron_urlvr.data.errors import DataError
from megatron_urlvr.data.labels import LabelStore
from megatron_urlvr.data.sources import load_source
from megatron_urlvr.data.tokenizer import character_tokenizer

CHAT = "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"


@pytest.fixture
def tokenizer():
    return character_tokenizer("".join(map(chr, range(32, 127))) + "\n", eos="~")


@pytest.fixture
def load(tmp_path, tokenizer):
    def load(rows, *, labels=None, limit_tokens=100, overlong="refuse", **settings):
        path = tmp_path / "data.jsonl"
        text = rows if isinstance(rows, str) else "\n".join(json.dumps(row) for row in rows)
        path.write_text(text, encoding="utf-8")
        settings.setdefault("grading", GradingSection(equivalence="exact"))
        return load_source(
            JsonlSource(path=str(path), **settings),
            name="math",
            tokenizer=tokenizer,
            labels=LabelStore() if labels is None else labels,
            split="train",
            seed=0,
            max_prompt_tokens=limit_tokens,
            overlong=overlong,
        )

    return load


def test_prompts_are_read_in_order_and_labels_put_away(load, tokenizer):
    labels = LabelStore()
    loaded = load(
        [{"prompt": "1+1", "answer": 2, "solution": "secret"}, {"prompt": "2+2", "answer": "so \\boxed{4.0}"}],
        labels=labels,
        plain_template="Q: {prompt}\nA:",
    )
    assert [p.id for p in loaded.prompts] == ["math/1", "math/2"]
    assert [p.text for p in loaded.prompts] == ["Q: 1+1\nA:", "Q: 2+2\nA:"]
    assert list(loaded.prompts[0].tokens) == tokenizer("Q: 1+1\nA:")["input_ids"]
    assert loaded.prompts[0].fields == {"question": "1+1"}
    assert [labels.get(p.id, use="audit") for p in loaded.prompts] == ["2", "4"]
    assert "secret" not in repr(loaded)


def test_field_names_can_be_chosen_and_braces_in_prompts_are_kept(load):
    labels = LabelStore()
    loaded = load(
        [{"q": "solve {x} {prompt}", "gold": "7", "key": "a"}],
        labels=labels,
        prompt_field="q",
        label_field="gold",
        id_field="key",
        plain_template="{prompt}?",
    )
    assert loaded.prompts[0].id == "math/a"
    assert loaded.prompts[0].text == "solve {x} {prompt}?"
    assert labels.get("math/a", use="audit") == "7"


def test_the_chat_template_of_the_tokenizer_is_applied(load, tokenizer):
    tokenizer.chat_template = CHAT
    loaded = load([{"prompt": "1+1", "answer": "2"}], template="chat", system="be brief")
    assert loaded.prompts[0].text == "<s>be brief<u>1+1<a>"


def test_a_chat_template_that_refuses_is_a_sentence(load, tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(DataError, match="chat template refuses the prompt: no system role"):
        load([{"prompt": "1"}], template="chat")


def test_chat_without_a_template_and_system_without_chat_are_refused(load):
    with pytest.raises(DataError, match="needs a tokenizer with a chat template"):
        load([{"prompt": "1"}], template="chat")
    with pytest.raises(DataError, match="system = 'x' needs template: chat"):
        load([{"prompt": "1"}], system="x")


def test_blank_lines_and_a_byte_order_mark_are_passed_over(load):
    loaded = load('\ufeff{"prompt": "1", "answer": 1}\n\n{"prompt": "2", "answer": 2}\n')
    assert [p.id for p in loaded.prompts] == ["math/1", "math/3"]


def test_the_limit_counts_rows(load):
    rows = [{"prompt": str(i), "answer": i} for i in range(10)]
    assert len(load(rows, limit=4)) == 4


def test_rows_without_a_label_are_counted(load):
    labels = LabelStore()
    loaded = load([{"prompt": "1", "answer": None}, {"prompt": "2"}, {"prompt": "3", "answer": 3}], labels=labels)
    assert loaded.unlabelled == 2
    assert len(labels) == 1
    assert load([{"prompt": "1"}], label_field=None).unlabelled == 1


def test_overlong_prompts_are_refused_by_name_or_dropped_and_counted(load):
    rows = [{"prompt": "1" * 5, "answer": 1}, {"prompt": "1" * 11, "answer": 1}, {"prompt": "12345", "answer": 1}]
    with pytest.raises(DataError, match=r"'math/2' has 11 tokens and data\.max_prompt_tokens is 10"):
        load(rows, limit_tokens=10)
    labels = LabelStore()
    loaded = load(rows, limit_tokens=10, overlong="filter", labels=labels)
    assert [p.id for p in loaded.prompts] == ["math/1", "math/3"]
    assert loaded.dropped_overlong == 1
    assert "math/2" not in labels
    with pytest.raises(DataError, match="all 3 are longer than max_prompt_tokens = 4"):
        load(rows, limit_tokens=4, overlong="filter")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", "has no rows"),
        ("\n\n", "has no rows"),
        ('{"prompt": "1"}\n{"prompt"', "line 2 is not valid JSON"),
        ("[1]", "line 1 is a list; an object is expected"),
        ([{"question": "1"}], r"line 1 has no prompt \(key 'prompt'; it has question\)"),
        ([{"prompt": None}], "line 1 has no prompt"),
        ([{"prompt": "  "}], "line 1 has an empty prompt"),
        ([{"prompt": ["1"]}], "line 1 has a list under 'prompt'; a string is expected"),
        ([{"prompt": "1", "answer": [1]}], "line 1 has a list under 'answer'"),
        ([{"prompt": "1", "answer": True}], "line 1 has a bool under 'answer'"),
        ([{"prompt": "1", "answer": ""}], "line 1 has an empty label"),
        ([{"prompt": "1"}], r"no row of .* has the label_field 'answer' \(keys: prompt\).*set label_field to null"),
    ],
)
def test_unusable_files_are_sentences_with_line_numbers(load, rows, message):
    with pytest.raises(DataError, match=message):
        load(rows)


def test_duplicate_and_missing_ids_are_refused(load):
    rows = [{"prompt": "1", "id": "a"}, {"prompt": "2", "id": "b"}, {"prompt": "3", "id": "a"}]
    with pytest.raises(DataError, match="line 3 has the id 'a' of line 1"):
        load(rows, id_field="id")
    with pytest.raises(DataError, match="line 1 has no id"):
        load([{"prompt": "1"}], id_field="id")


def test_all_unusable_rows_are_counted_and_the_first_ones_listed(load):
    with pytest.raises(DataError, match=r"has 8 unusable rows: line 1 .*line 5 .*; and 3 more"):
        load([{}] * 8)


def test_missing_files_folders_and_binary_files_are_sentences(tmp_path, load):
    source = {"name": "x", "tokenizer": None, "labels": LabelStore(), "split": "train", "seed": 0}
    limits = {"max_prompt_tokens": 5, "overlong": "refuse"}
    with pytest.raises(DataError, match="does not exist"):
        load_source(JsonlSource(path=str(tmp_path / "no.jsonl")), **source, **limits)
    with pytest.raises(DataError, match="is not a file"):
        load_source(JsonlSource(path=str(tmp_path)), **source, **limits)
    (tmp_path / "b").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="is not UTF-8 text"):
        load_source(JsonlSource(path=str(tmp_path / "b")), **source, **limits)


def test_the_fingerprint_follows_texts_and_labels(load):
    first = load([{"prompt": "1", "answer": 1}]).fingerprint
    assert load([{"prompt": "1", "answer": 1}]).fingerprint == first
    assert load([{"prompt": "1", "answer": 2}]).fingerprint != first
    assert load([{"prompt": "2", "answer": 1}]).fingerprint != first


def test_what_a_tokenizer_begins_a_text_with_is_kept_and_what_it_ends_one_with_is_not(load, tokenizer):
    begin, end = tokenizer("<~", add_special_tokens=False)["input_ids"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="< $A ~", special_tokens=[("<", begin), ("~", end)]
    )
    bare = tokenizer("12", add_special_tokens=False)["input_ids"]
    assert tokenizer("12")["input_ids"] == [begin, *bare, end]
    assert list(load([{"prompt": "12", "answer": 1}]).prompts[0].tokens) == [begin, *bare]
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert list(load([{"prompt": "12", "answer": 1}], template="chat").prompts[0].tokens) == bare
