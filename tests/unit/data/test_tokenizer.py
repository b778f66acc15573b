import json

import pytest
from transformers import AutoTokenizer

from megatron_urlvr.data.errors import DataError
from megatron_urlvr.data.tasks import get_task
from megatron_urlvr.data.tokenizer import load_tokenizer, save_tokenizer, stop_ids

TEXT = "314159=c48943#3$"


@pytest.fixture
def folder(tmp_path):
    """A base policy's folder as pretraining leaves it, weights aside."""
    save_tokenizer(get_task("chain_sum").tokenizer(), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "vocab_size": 21}))
    return tmp_path


def test_every_character_is_one_token_and_the_end_is_dropped_in_decoding():
    tokenizer = get_task("chain_sum").tokenizer()
    ids = tokenizer(TEXT)["input_ids"]
    assert len(ids) == len(TEXT)
    assert len(tokenizer) == 21
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.decode(ids, skip_special_tokens=True) == TEXT[:-1]
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.pad_token_id == 20


@pytest.mark.parametrize(
    "load", [load_tokenizer, lambda path: AutoTokenizer.from_pretrained(path, local_files_only=True)]
)
def test_a_saved_tokenizer_reads_the_same_here_and_through_transformers_auto_class(folder, load):
    original = get_task("chain_sum").tokenizer()
    tokenizer = load(folder)
    ids = original(TEXT)["input_ids"]
    assert tokenizer(TEXT)["input_ids"] == ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == TEXT[:-1]
    assert len(tokenizer) == len(original)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (original.eos_token_id, original.pad_token_id)


def test_a_character_outside_the_alphabet_is_an_error_not_a_silent_loss(folder):
    with pytest.raises(Exception, match="vocabulary"):
        load_tokenizer(folder)("12x")


def test_the_class_written_is_one_that_transformers_4_knows(folder):
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_stops_are_those_of_the_tokenizer_and_of_the_generation_config(folder):
    tokenizer = load_tokenizer(folder)
    assert stop_ids(tokenizer, folder) == {19}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    assert stop_ids(tokenizer, folder) == {3, 4, 19}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 5}))
    assert stop_ids(tokenizer, folder) == {5, 19}


def test_without_any_stop_the_folder_is_refused(folder):
    tokenizer = load_tokenizer(folder)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="names an end-of-sequence token"):
        stop_ids(tokenizer, folder)


def test_missing_and_broken_tokenizers_are_sentences(tmp_path):
    with pytest.raises(DataError, match="is not a folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"neither tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match="is not valid JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be read"):
        load_tokenizer(tmp_path)
