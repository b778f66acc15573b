"""Checksums of the weights that were sent, to hold against those that servers compute of what they have.

SGLang (0.5.23) joins some tensors, pads the vocabulary with rows of zeros, and on a CPU names the first eight bytes of
SHA-256 of each parameter; on CUDA it hashes otherwise, and there servers can only be compared with each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from .buckets import Bucket

JOINED = {
    "q_proj": ("qkv_proj", 0),
    "k_proj": ("qkv_proj", 1),
    "v_proj": ("qkv_proj", 2),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}
"""What a module of the Hugging Face model becomes a part of on a server, and which part."""
PARTS = {"qkv_proj": 3, "gate_up_proj": 2}
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
PAD_TO = 64
"""Rows of the vocabulary's tensors are a multiple of this on a server."""


class Checksums:
    """Of one update, tensor by tensor as buckets pass."""

    def __init__(self) -> None:
        self.expected: dict[str, frozenset[str]] = {}
        """Checksums that a server may have, by its own parameter names."""
        self._parts: dict[str, dict[int, torch.Tensor]] = {}

    def add(self, bucket: Bucket) -> None:
        """Take in a bucket. Copies what waits for the rest of a joined tensor."""
        flat = bucket.flat.cpu()
        for entry in bucket.entries:
            data = flat[entry.start : entry.end]
            module, kind = ["", *entry.name.split(".")][-2:]
            if module in JOINED:
                joined, place = JOINED[module]
                name = entry.name.replace(f"{module}.{kind}", f"{joined}.{kind}")
                parts = self._parts.setdefault(name, {})
                parts[place] = data.clone()
                if len(parts) == PARTS[joined]:
                    self.expected[name] = frozenset({checksum(*(parts[k] for k in sorted(parts)))})
                    del self._parts[name]
            elif entry.name in VOCABULARY:
                row = (entry.end - entry.start) // entry.shape[0]
                padding = torch.zeros(-entry.shape[0] % PAD_TO * row, dtype=torch.uint8)
                self.expected[entry.name] = frozenset({checksum(data), checksum(data, padding)})
            else:
                self.expected[entry.name] = frozenset({checksum(data)})

    def wrong(self, held: Mapping[str, str]) -> list[str]:
        """Names of the parameters that a server has with another checksum, `held` being its own by name. Parameters
        that were not sent (a head that is tied to the embedding) are left out; all of them, if none was sent."""
        common = self.expected.keys() & held.keys()
        return sorted(name for name in common if held[name] not in self.expected[name]) if common else sorted(held)


def checksum(*pieces: torch.Tensor) -> str:
    """SGLang's, of uint8 tensors laid end to end."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece.contiguous().numpy().data)
    return digest.digest()[:8].hex()


def read_checksums(answer: Any) -> list[dict[str, str]]:
    """Checksums by parameter name, of each rank of a server, in `answer` to `/weights_checker`. ValueError when it is
    not one."""
    ranks = answer.get("ranks") if isinstance(answer, Mapping) else None
    if not isinstance(ranks, list) or not ranks or not all(isinstance(rank, Mapping) for rank in ranks):
        raise ValueError(f"/weights_checker named no checksums: {str(answer)[:200]}")
    found = [rank.get("checksums") for rank in ranks]
    if any(not isinstance(each, Mapping) or not each for each in found):
        raise ValueError(f"/weights_checker named no checksums: {str(answer)[:200]}")
    return [dict(each) for each in found if each is not None]
