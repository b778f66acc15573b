"""Whether a checkpoint is whole, of this model and safe to read: its manifest, and the names in its pickled index."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

FORMAT = 2
MANIFEST = "manifest.json"
HASHED_BELOW = 64 << 20
"""Files up to this size are verified by SHA-256, larger ones by size."""
Entry = dict[str, Any]
"""A file in the manifest: `bytes`, and `sha256` of those that are hashed."""

# What torch's checkpoint index is made of. It is a pickle, which may name any function and call it: one that names
# anything else is refused, and nothing in it is called to find out.
_INDEX_NAMES = {
    "builtins": {"set", "frozenset"},
    "collections": {"OrderedDict"},
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
}


def verify(path: Path, fingerprint: dict[str, Any]) -> str:
    """A sentence that says what is wrong with a checkpoint; empty when it is whole and of this model."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        written, files, model, *_ = (manifest[key] for key in ("format", "files", "model", "stepped", "layout"))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return f"checkpoint {path} is refused: it has no readable {MANIFEST}, so it is not one of this program's"
    if written != FORMAT:
        return f"checkpoint {path} is refused: format {written!r}, this program reads {FORMAT}"
    for name, entry in files.items():
        file = path / name
        if not file.is_file():
            return f"checkpoint {path} is refused: {name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"checkpoint {path} is refused: {name} holds {file.stat().st_size} bytes of {entry['bytes']}"
        if "sha256" in entry and sha256(file) != entry["sha256"]:
            return f"checkpoint {path} is refused: the contents of {name} have changed since it was written"
    if model != fingerprint:
        differing = sorted(k for k in {*model, *fingerprint} if model.get(k) != fingerprint.get(k))
        return f"checkpoint {path} is refused: it belongs to another model ({', '.join(differing)} differ)"
    problem = index_problem(path)
    return problem and f"checkpoint {path} is refused: {problem}"


def index_problem(path: Path) -> str:
    """What forbids reading a checkpoint's index, which is a pickle; empty when it names nothing that runs code."""
    try:
        unsafe = _unsafe_names(path / ".metadata")
    except Exception as error:  # a broken pickle raises whatever its bytes happen to ask for
        return f"its index cannot be read ({type(error).__name__}: {error})"
    return f"its index names {', '.join(unsafe)}, which no checkpoint needs" if unsafe else ""


def _unsafe_names(index: Path) -> list[str]:
    """What torch's pickled checkpoint index names that no index needs; nothing in it is called to find out."""
    names = _Names(io.BytesIO(index.read_bytes()))
    names.load()
    return sorted(f"{module}.{name}" for module, name in names.found if not _belongs_in_index(module, name))


def _belongs_in_index(module: str, name: str) -> bool:
    is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
    return is_dtype or name in _INDEX_NAMES.get(module, ())


class _Names(pickle.Unpickler):
    """Reads a pickle with an inert object in place of everything that it names, and keeps the names."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.found: set[tuple[str, str]] = set()

    def find_class(self, module: str, name: str) -> Any:
        self.found.add((module, name))
        return _Inert


class _Inert:
    """Can be made, called, filled and used as a key, and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def __call__(self, *args: Any, **kwargs: Any) -> _Inert:
        return self

    def __setstate__(self, state: Any) -> None: ...
    def __setitem__(self, key: Any, value: Any) -> None: ...
    def append(self, item: Any) -> None: ...
    def extend(self, items: Any) -> None: ...
    def add(self, item: Any) -> None: ...


def sha256(file: Path) -> str:
    """Hash of a file's contents, in hexadecimal."""
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_manifest(folder: Path, known: Mapping[str, Entry], **fields: Any) -> None:
    """Write the manifest of the files in `folder`. Those that are not `known` are made durable and hashed first;
    `fields` are kept beside them."""
    files = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(file.relative_to(folder))
        if name not in known:
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        files[name] = known[name] if name in known else entry_of(file)
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, **fields, "files": files}, indent=1))


def entry_of(file: Path) -> Entry:
    """What the manifest says of a file: its size, and its hash where it is not too large for one."""
    size = file.stat().st_size
    return {"bytes": size} | ({"sha256": sha256(file)} if size <= HASHED_BELOW else {})
