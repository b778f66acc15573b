"""Tokenizers: character tokenizers for the built-in tasks, loading, saving, and which tokens end a response."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .errors import DataError

PAD = "<pad>"
NO_CHAT_TEMPLATE = "template: chat needs a tokenizer with a chat template, and this one has none: use template: plain"
GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Names transformers 4 and 5 write for a tokenizer that is defined by tokenizer.json alone."""


def character_tokenizer(alphabet: str, *, eos: str) -> PreTrainedTokenizerFast:
    """One token a character of `alphabet`, in that order, then the padding token. `eos` is special: decoding with
    `skip_special_tokens` drops it. Encoding any other character raises."""
    if eos not in alphabet or len(set(alphabet)) != len(alphabet):
        raise ValueError(f"the alphabet {alphabet!r} must hold each character once, and the end {eos!r} among them")
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    vocabulary[PAD] = len(alphabet)
    core = Tokenizer(models.WordLevel(vocabulary))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (eos, PAD)])
    # In a folder whose config.json says qwen2, transformers 5 loads every tokenizer as Qwen2Tokenizer, whose default
    # unknown token would be added to the vocabulary. Naming an existing one keeps the size; nothing is mapped to it.
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=eos, pad_token=PAD, unk_token=PAD, clean_up_tokenization_spaces=False
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write `tokenizer` to `folder` so that transformers 4 (a server's environment, say) and 5 both read it."""
    tokenizer.save_pretrained(str(folder))
    path = Path(folder) / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") in GENERIC_CLASSES:
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in the folder `path`. Local files alone; DataError where there is none or it cannot be read."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise DataError(
            f"{str(path)!r} is not a folder: model.path must be a Hugging Face folder with a tokenizer in it"
        )
    config = _read_json(folder / "tokenizer_config.json")
    if not config and not (folder / "tokenizer.json").exists():
        raise DataError(
            f"{str(path)!r} has neither tokenizer.json nor tokenizer_config.json: copy the tokenizer's files there"
        )
    # AutoTokenizer would rebuild a generic tokenizer as the class its model type suggests; the file is what counts.
    generic = config.get("tokenizer_class") in GENERIC_CLASSES and (folder / "tokenizer.json").exists()
    loader: Any = PreTrainedTokenizerFast if generic else AutoTokenizer
    try:
        return loader.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        raise DataError(f"the tokenizer in {str(path)!r} cannot be read: {type(error).__name__}: {error}") from error


def stop_ids(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> frozenset[int]:
    """Ids that end a response: the tokenizer's end token and those of `folder`/generation_config.json.

    DataError if there are none, since every response would run to the length limit.
    """
    listed = _read_json(Path(folder).expanduser() / "generation_config.json").get("eos_token_id")
    ids = set() if listed is None else set(listed) if isinstance(listed, list) else {listed}
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    if not ids:
        raise DataError(
            f"neither the tokenizer nor generation_config.json in {str(folder)!r} names an end-of-sequence token: "
            "set eos_token in tokenizer_config.json"
        )
    return frozenset(int(i) for i in ids)


def _read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; empty where the file is missing."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{str(path)!r} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{str(path)!r} holds a {type(value).__name__}; an object is expected")
    return value


def bare_tokens(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> tuple[int, ...]:
    """Tokens of a prompt. `special`: with what the tokenizer begins a text with, without what it ends one with."""
    ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
    return tuple(without_end(tokenizer, text, ids) if special else ids)


def without_end(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int]) -> list[int]:
    """`ids` without the end that some tokenizers put after every text: a prompt goes on."""
    ended = ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(str(tokenizer.eos_token))
    return ids[:-1] if ended else ids


def chat_text(tokenizer: PreTrainedTokenizerBase, question: str, system: str | None = None) -> str:
    """`question` as one user message under the tokenizer's chat template. DataError where it has none or refuses."""
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(NO_CHAT_TEMPLATE)
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": question})
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template raises whatever its author chose
        raise DataError(f"the tokenizer's chat template refuses the prompt: {error}") from error
