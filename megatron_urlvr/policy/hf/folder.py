"""Reading and writing Hugging Face model folders: config.json and safetensors, sharded or not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence, Set
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
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise UnusableInput(f"model.path = {folder}: it holds no config.json") from None
    except json.JSONDecodeError as error:
        raise UnusableInput(f"{path}: not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise UnusableInput(f"{path}: holds a {type(config).__name__}; an object is expected")
    return config


class TensorFolder:
    """Lazy access to the tensors of a model folder by name; one is read at a time."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = self.folder / INDEX
        if index.exists():
            self._file_of: dict[str, str] = json.loads(index.read_text())["weight_map"]
        elif (self.folder / SINGLE).exists():
            with self._open(SINGLE) as file:
                self._file_of = dict.fromkeys(file.keys(), SINGLE)
        else:
            raise UnusableInput(
                f"model.path = {folder}: it holds neither {SINGLE} nor {INDEX}; only safetensors are read"
            )

    def _open(self, name: str) -> Any:
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
        if name not in self._file_of:
            raise UnusableInput(f"model.path = {self.folder}: tensor {name} is missing")
        with self._open(self._file_of[name]) as file:
            tensor = file.get_tensor(name)
        if tuple(tensor.shape) != expected:
            raise UnusableInput(
                f"model.path = {self.folder}: tensor {name} has shape {tuple(tensor.shape)}, expected {expected}"
                " from config.json"
            )
        return tensor


_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


def write_tensors(path: Path, described: Sequence[tuple[str, torch.Tensor]], tensors: Iterable[torch.Tensor]) -> None:
    """Write one safetensors file, a tensor at a time. `described`: names, types and shapes, in the order of `tensors`.

    The format: the header's length (8 bytes, little-endian), the header (JSON, padded with spaces), the bytes. KeyError
    for a type that the format has no name for here.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in described:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (_, expected), tensor in zip(described, tensors, strict=True):
            assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape)
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


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
