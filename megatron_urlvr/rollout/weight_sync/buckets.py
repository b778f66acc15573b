"""Tensors that travel together: in one flat buffer, which servers load as a `flattened_bucket`, or each as it lies.
Both are at the same time the data of a safetensors file.

One buffer is one broadcast, and packing costs a GPU little. On a CPU a broadcast costs little, and packing as much as
the wire.
"""

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
    """Tensors that travel together, and what lies where."""

    pieces: tuple[torch.Tensor, ...]
    """`[bytes]` uint8 each, on the policy's device: one flat buffer, or (apart) one for each entry."""
    entries: tuple[Entry, ...]
    packed: bool = True
    """The entries lie in one buffer."""
    own: bool = True
    """The memory is this bucket's alone. False: it is that of tensors that may change after the update."""

    @property
    def size(self) -> int:
        """Bytes."""
        return self.entries[-1].end

    @property
    def flat(self) -> torch.Tensor:
        """`[bytes]` uint8: all of it end to end. A copy where the entries are apart."""
        return self.pieces[0] if len(self.pieces) == 1 else torch.cat(self.pieces)

    def request(self) -> dict[str, Any]:
        """The fields by which a server is told what comes: one buffer, or a tensor for each name."""
        fields: dict[str, Any] = {
            "names": [entry.name for entry in self.entries],
            "dtypes": [str(entry.dtype).removeprefix("torch.") for entry in self.entries],
            "shapes": [list(entry.shape) for entry in self.entries],
        }
        return fields | ({"load_format": "flattened_bucket"} if self.packed else {})

    def tensors(self) -> list[torch.Tensor]:
        """What is broadcast, in order: the buffer, or each tensor as it is."""
        if self.packed:
            return list(self.pieces)
        return [p.view(e.dtype).reshape(e.shape) for p, e in zip(self.pieces, self.entries, strict=True)]

    def copied(self) -> Bucket:
        """The same in memory of its own."""
        return self if self.own else Bucket(tuple(piece.clone() for piece in self.pieces), self.entries, self.packed)

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
            for piece in self.pieces:
                file.write(piece.cpu().numpy().data)


def buckets(stream: Iterable[tuple[str, torch.Tensor]], limit: int, *, packed: bool = True) -> Iterator[Bucket]:
    """A stream of tensors as buckets of at most `limit` bytes (more only for a single larger tensor).

    `packed`: tensors that share a bucket are copied into one buffer; one that is alone in its bucket is not. Otherwise
    nothing is copied that is contiguous.
    """
    gathered: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in stream:
        more = tensor.numel() * tensor.element_size()
        if gathered and size + more > limit:
            yield make_bucket(gathered, packed=packed)
            gathered, size = [], 0
        gathered.append((name, tensor.detach()))
        size += more
    if gathered:
        yield make_bucket(gathered, packed=packed)


def make_bucket(tensors: Iterable[tuple[str, torch.Tensor]], *, packed: bool = True) -> Bucket:
    """One bucket of `tensors`. Wide types come first, so that every tensor is aligned to its type."""
    ordered = sorted(tensors, key=lambda item: -item[1].element_size())
    entries, start = [], 0
    for name, tensor in ordered:
        end = start + tensor.numel() * tensor.element_size()
        entries.append(Entry(name, tensor.dtype, tuple(tensor.shape), start, end))
        start = end
    if not packed or len(ordered) == 1:
        pieces = tuple(tensor.contiguous().view(-1).view(torch.uint8) for _, tensor in ordered)
        return Bucket(pieces, tuple(entries), packed, own=False)
    flat = torch.empty(start, dtype=torch.uint8, device=ordered[0][1].device)
    for entry, (_, tensor) in zip(entries, ordered, strict=True):
        flat[entry.start : entry.end].view(tensor.dtype).copy_(tensor.reshape(-1))
    return Bucket((flat,), tuple(entries))
