"""Reading and writing Hugging Face model folders: config.json and safetensors, sharded or not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ...exit_codes import UnusableInput

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "added_tokens.json",
)


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a model folder; UnusableInput when folder or file is missing or broken."""
    path = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        raise UnusableInput(
            f"model.path = {folder}: no such folder; give a Hugging Face folder (config.json, safetensors, tokenizer),"
            " or make a small one with `urlvr pretrain`"
        )
    if not path.is_file():
        raise UnusableInput(f"model.path = {folder}: it holds no config.json")
    return _read_object(path)


def _read_object(path: Path) -> dict[str, Any]:
    """The object of a JSON file; UnusableInput names the file when it holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UnusableInput(f"{path}: cannot be read ({error.strerror}); make it readable") from None
    except UnicodeDecodeError as error:
        raise UnusableInput(f"{path}: not UTF-8 text ({error}); copy the file again") from None
    except (ValueError, RecursionError) as error:
        raise UnusableInput(f"{path}: not valid JSON ({error}); copy the file again") from None
    if not isinstance(found, dict):
        raise UnusableInput(f"{path}: holds a {type(found).__name__}, an object is expected; copy the file again")
    return found


@dataclass(frozen=True)
class Stored:
    """A tensor as a file holds it: where its bytes lie, without its values."""

    file: Path
    at: int
    """Offset of the first byte in the file."""
    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorFolder:
    """Lazy access to the tensors of a model folder by name; one is read at a time."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._headers: dict[str, dict[str, Any]] = {}
        index = self.folder / INDEX
        if index.exists():
            self._file_of = self._indexed(index)
        elif (self.folder / SINGLE).exists():
            with self._open(SINGLE) as file:
                self._file_of = dict.fromkeys(file.keys(), SINGLE)
        else:
            raise UnusableInput(
                f"model.path = {folder}: it holds neither {SINGLE} nor {INDEX}; only safetensors are read"
            )

    def _indexed(self, index: Path) -> dict[str, str]:
        """The file of each tensor. UnusableInput when the index does not say, or names a file that is not there."""
        file_of = _read_object(index).get("weight_map")
        if not isinstance(file_of, dict) or not all(isinstance(name, str) for name in file_of.values()):
            raise UnusableInput(f"{index}: its weight_map does not say which file holds which tensor; copy it again")
        if missing := sorted({name for name in file_of.values() if not (self.folder / name).is_file()}):
            raise UnusableInput(
                f"{index}: it names {missing[0]} (and {len(missing) - 1} more), which is not there; copy the folder"
                " again"
            )
        return file_of

    def _open(self, name: str) -> Any:
        """A file, its header and length checked."""
        try:
            return safe_open(self.folder / name, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UnusableInput(f"{self.folder / name}: cannot be read ({error}); copy the folder again") from None

    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._file_of)

    def refuse_unexpected(self, known: Set[str], *, tied: bool) -> None:
        """UnusableInput that names a tensor of the folder which is not in `known`. Rotary tables, which old folders
        hold, and the head of a `tied` model are passed over: the config and the embeddings say the same."""
        extra = {name for name in self.names() - known if not name.endswith("rotary_emb.inv_freq")}
        if tied:
            extra.discard("lm_head.weight")
        if extra:
            raise UnusableInput(
                f"model.path = {self.folder}: unexpected tensor {min(extra)} (and {len(extra) - 1} more)"
            )

    def read(self, name: str, expected: tuple[int, ...]) -> torch.Tensor:
        """One tensor, on the CPU; UnusableInput when it is missing or misshapen."""
        file = self._holding(name)
        with self._open(file) as opened:
            try:
                tensor: torch.Tensor = opened.get_tensor(name)
            except SafetensorError as error:
                raise UnusableInput(f"{self.folder / file}: {error}; copy the folder again") from None
        self._refuse_misshapen(name, tuple(tensor.shape), expected)
        return tensor

    def locate(self, name: str, expected: tuple[int, ...]) -> Stored:
        """Where one tensor lies; UnusableInput when it is missing, misshapen, or of a type that is not converted."""
        file = self._holding(name)
        if file not in self._headers:
            self._headers[file] = self._header(file)
        entry = self._headers[file].get(name)
        if entry is None:
            raise UnusableInput(f"{self.folder / file}: it holds no tensor {name}; copy the folder again")
        if entry["dtype"] not in TYPES:
            raise UnusableInput(
                f"{self.folder / file}: tensor {name} is {entry['dtype']}; supported: {', '.join(TYPES)}"
            )
        self._refuse_misshapen(name, tuple(entry["shape"]), expected)
        return Stored(self.folder / file, entry["at"], TYPES[entry["dtype"]], expected)

    def _header(self, name: str) -> dict[str, Any]:
        """The entries of a file's header, each with the offset of its tensor in the file as `at`."""
        with self._open(name), open(self.folder / name, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        return {key: {**entry, "at": 8 + length + entry["data_offsets"][0]} for key, entry in entries.items()}

    def _holding(self, name: str) -> str:
        if name not in self._file_of:
            raise UnusableInput(f"model.path = {self.folder}: tensor {name} is missing")
        return self._file_of[name]

    def _refuse_misshapen(self, name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if shape != expected:
            raise UnusableInput(
                f"model.path = {self.folder}: tensor {name} has shape {shape}, expected {expected} from config.json"
            )


TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
"""The names of the types that weights are kept in."""


def header_of(tensors: Sequence[tuple[str, torch.Tensor]]) -> tuple[bytes, list[int]]:
    """What a safetensors file of `tensors`, names with types and shapes, begins with; and the offset of each in it.

    The format: the header's length (8 bytes, little-endian), the header (JSON, padded with spaces), the bytes. KeyError
    for a type that is not one of TYPES.
    """
    names = {dtype: name for name, dtype in TYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ends = [0]
    for name, tensor in tensors:
        ends.append(ends[-1] + tensor.nbytes)
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": ends[-2:]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, [start + end for end in ends]


def write_folder(
    folder: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    config: Mapping[str, Any],
    tokenizer_from: Path | None,
    max_shard_bytes: int = 4 << 30,
) -> None:
    """Write a stream of Hugging Face-named tensors as a model folder; at most one shard is held in memory.

    The tokenizer's files are copied from `tokenizer_from`. Tensors keep their dtype.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shard: dict[str, torch.Tensor] = {}
    files: list[Path] = []
    weight_map: dict[str, int] = {}
    held = total = 0

    def flush() -> None:
        nonlocal held
        if shard:
            files.append(folder / f"part-{len(files)}.safetensors")
            save_file(shard, files[-1], metadata={"format": "pt"})
            shard.clear()
            held = 0

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if held and held + size > max_shard_bytes:
            flush()
        shard[name] = tensor.detach().to("cpu").contiguous().clone()
        weight_map[name] = len(files)
        held += size
        total += size
    flush()
    if len(files) == 1:
        files[0].rename(folder / SINGLE)
    else:
        names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
        for file, name in zip(files, names, strict=True):
            file.rename(folder / name)
        index = {"metadata": {"total_size": total}, "weight_map": {k: names[i] for k, i in weight_map.items()}}
        (folder / INDEX).write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
    if tokenizer_from is not None:
        for file_name in TOKENIZER_FILES:
            if (tokenizer_from / file_name).exists():
                shutil.copy2(tokenizer_from / file_name, folder / file_name)
