"""Parquet files and data sets give the prompts that the same rows give as JSON lines."""

import builtins
import json

import pytest

from megatron_urlvr.config.data import DatasetSource, GradingSection, JsonlSource
from megatron_urlvr.data.errors import DataError
from megatron_urlvr.data.labels import LabelStore
from megatron_urlvr.data.sources import load_source
from megatron_urlvr.data.tokenizer import character_tokenizer

parquet = pytest.importorskip("pyarrow.parquet")
arrow = pytest.importorskip("pyarrow")
datasets = pytest.importorskip("datasets")

ROWS = [
    {"prompt": "1+1", "answer": "2", "other": "one plus one", "tests": "assert True", "id": "a"},
    {"prompt": "2+2", "answer": "4", "other": None, "tests": None, "id": "b"},
    {"prompt": "3+3", "answer": None, "other": "three and three", "tests": "", "id": "c"},
]
COLUMNS = {"paraphrase_field": "other", "tests_field": "tests", "id_field": "id", "plain_template": "Q {prompt}"}


def load(source, labels=None):
    return load_source(
        source,
        name="set",
        tokenizer=character_tokenizer("".join(map(chr, range(32, 127))), eos="~"),
        labels=LabelStore() if labels is None else labels,
        split="train",
        seed=0,
        max_prompt_tokens=100,
        overlong="refuse",
    )


@pytest.fixture
def sources(tmp_path):
    """The same rows as JSON lines, as Parquet, and as a data set with two splits."""
    grading = GradingSection(equivalence="exact")
    lines, table, folder = tmp_path / "rows.jsonl", tmp_path / "rows.parquet", tmp_path / "saved"
    lines.write_text("\n".join(map(json.dumps, ROWS)))
    parquet.write_table(arrow.Table.from_pylist(ROWS), table)
    split = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": split, "other": split.select([1])}).save_to_disk(str(folder))
    return {
        "jsonl": JsonlSource(path=str(lines), grading=grading, **COLUMNS),
        "parquet": JsonlSource(path=str(table), grading=grading, **COLUMNS),
        "dataset": DatasetSource(dataset=str(folder), grading=grading, **COLUMNS),
    }


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "dataset"])
def test_every_kind_of_table_gives_the_same_prompts_and_labels(kind, sources):
    labels = LabelStore()
    loaded = load(sources[kind], labels)
    assert [prompt.id for prompt in loaded.prompts] == ["set/a", "set/b", "set/c"]
    assert [prompt.text for prompt in loaded.prompts] == ["Q 1+1", "Q 2+2", "Q 3+3"]
    assert [labels.get(p.id, use="audit") for p in loaded.prompts[:2]] == ["2", "4"]
    assert loaded.unlabelled == 1
    assert loaded.fingerprint == load(sources["jsonl"]).fingerprint
    first, second, third = (prompt.fields for prompt in loaded.prompts)
    assert first["paraphrase"] == "Q one plus one"
    assert len(first["paraphrase_tokens"]) == len("Q one plus one")
    assert first["tests"] == "assert True"
    assert second == {"question": "2+2"}
    assert "tests" not in third


def test_a_limit_a_split_and_an_unknown_split(sources):
    assert len(load(sources["parquet"].model_copy(update={"limit": 2}))) == 2
    assert [p.id for p in load(sources["dataset"].model_copy(update={"split": "other"})).prompts] == ["set/b"]
    with pytest.raises(DataError, match="has no split 'test'; it has train, other"):
        load(sources["dataset"].model_copy(update={"split": "test"}))


def test_tables_that_are_none_are_sentences(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="does not exist"):
        load(JsonlSource(path=str(tmp_path / "no.parquet")))
    (tmp_path / "bad.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        load(JsonlSource(path=str(tmp_path / "bad.parquet")))
    monkeypatch.setattr(datasets, "load_dataset", _refuse)
    with pytest.raises(DataError, match=r"data set 'no/where' \(split 'train'\) cannot be loaded: no such thing"):
        load(DatasetSource(dataset="no/where"))


def _refuse(*_args, **_options):
    raise FileNotFoundError("no such thing\nand more")


@pytest.mark.parametrize("module", ["pyarrow", "datasets"])
def test_a_missing_library_says_what_to_install(module, tmp_path, sources, monkeypatch):
    original = builtins.__import__

    def refuse(name, *rest):
        if name.split(".")[0] == module:
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(DataError, match=r"pip install 'megatron-urlvr\[data\]'"):
        load(sources["parquet" if module == "pyarrow" else "dataset"])


def test_rows_with_other_types_are_named(tmp_path):
    parquet.write_table(arrow.Table.from_pylist([{"prompt": "1", "answer": "1", "tests": 3}]), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="line 1 has a int under 'tests'; a string is expected"):
        load(JsonlSource(path=str(tmp_path / "x.parquet"), tests_field="tests"))
