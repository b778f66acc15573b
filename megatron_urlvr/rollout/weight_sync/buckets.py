"""Tensors laid end to end: one flat buffer is broadcast, loaded by servers as a `flattened_bucket`, and is at the same
time the data of a safetensors file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}


@dataclass(frozen=True)
class Entry:
    """One tensor's place in a bucket."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int
    """Bytes."""


@dataclass(frozen=True)
class Bucket:
    """A flat buffer and what lies where in it."""

    flat: torch.Tensor
    """`[bytes]` uint8, on the policy's device."""
    entries: tuple[Entry, ...]

    def request(self) -> dict[str, Any]:
        """The fields by which a server is told what the buffer holds."""
        return {
            "names": [entry.name for entry in self.entries],
            "dtypes": [str(entry.dtype).removeprefix("torch.") for entry in self.entries],
            "shapes": [list(entry.shape) for entry in self.entries],
            "load_format": "flattened_bucket",
        }

    def write(self, path: Path) -> None:
        """Write a safetensors file. Its format is a length, a JSON header and the very bytes of `flat`: written here
        because the library's writer refuses tensors that share memory and would copy each."""
        header: dict[str, Any] = {
            entry.name: {
                "dtype": SAFETENSORS_NAMES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": [entry.start, entry.end],
            }
            for entry in self.entries
        }
        text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.write(self.flat.cpu().numpy().data)


def buckets(stream: Iterable[tuple[str, torch.Tensor]], limit: int) -> Iterator[Bucket]:
    """Copy a stream of tensors into buckets of at most `limit` bytes (more only for a single larger tensor)."""
    gathered: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in stream:
        more = tensor.numel() * tensor.element_size()
        if gathered and size + more > limit:
            yield flatten(gathered)
            gathered, size = [], 0
        gathered.append((name, tensor.detach()))
        size += more
    if gathered:
        yield flatten(gathered)


def flatten(tensors: Iterable[tuple[str, torch.Tensor]]) -> Bucket:
    """One bucket of `tensors`. Wide types come first, so that every tensor is aligned to its type."""
    ordered = sorted(tensors, key=lambda item: -item[1].element_size())
    entries, start = [], 0
    for name, tensor in ordered:
        end = start + tensor.numel() * tensor.element_size()
        entries.append(Entry(name, tensor.dtype, tuple(tensor.shape), start, end))
        start = end
    flat = torch.empty(start, dtype=torch.uint8, device=ordered[0][1].device)
    for entry, (_, tensor) in zip(entries, ordered, strict=True):
        flat[entry.start : entry.end].view(tensor.dtype).copy_(tensor.reshape(-1))
    return Bucket(flat, tuple(entries))
