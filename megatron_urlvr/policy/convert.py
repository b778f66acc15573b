"""Hugging Face folders to Megatron's distributed checkpoints and back, one parameter at a time.

    safetensors ─► rule.merge ─► one chunk of a `torch_dist` checkpoint, any layout reads it
    chunks of any layout's checkpoint ─► the whole parameter ─► rule.split ─► safetensors with an index

Nothing but the parameter at hand is in memory. Ranks (torchrun) share the files among them; bits and types are kept.
Megatron stores a parameter of all layers under one key, stacked: `decoder.layers.mlp.linear_fc2.weight`,
`[layers, ...]`, experts stacked once more behind the layers.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from ..distributed.layout import gather_json
from ..exit_codes import UnusableInput
from .hf.families import TRANSFORMER_ENGINE_NAMES, family_of, rules_for, shape_of
from .hf.folder import INDEX, SINGLE, TOKENIZER_FILES, TensorFolder, read_config, write_tensors
from .hf.rules import Rule, Shape, expected_shape
from .integrity import index_problem

METADATA = ".metadata"
_PLACES = re.compile(r"(?<=layers\.)(\d+)\.|(?<=local_experts\.)(\d+)\.")


@dataclass(frozen=True)
class Place:
    """Where a Megatron checkpoint keeps one parameter: a key, and its index along the stacked axes before it."""

    rule: Rule
    key: str
    at: tuple[int, ...]
    stacked: tuple[int, ...]
    """Sizes of the stacked axes."""
    shape: tuple[int, ...]
    """Of the parameter, vocabulary padded."""


def places(hf: Mapping[str, Any], folder: str, *, vocab_multiple: int = 1) -> list[Place]:
    """Every parameter of a model, in export order. UnusableInput for an architecture that is not supported."""
    family = family_of(hf, folder)
    shape = shape_of(hf, tp=vocab_multiple)
    layers = int(hf["num_hidden_layers"])
    tied = bool(hf.get("tie_word_embeddings", False))
    found = []
    for rule, _ in rules_for(family, layers, tied=tied, experts=shape.experts):
        at = tuple(int(number) for match in _PLACES.findall(rule.megatron) for number in match if number)
        key = _PLACES.sub("", rule.megatron).replace("local_experts.", "experts.")
        for plain, fused in TRANSFORMER_ENGINE_NAMES.items():
            if key == f"decoder.layers.{plain}" and not (family.experts and plain.startswith("pre_mlp")):
                key = f"decoder.layers.{fused}"
        parts = [torch.empty(expected_shape(name, shape), device="meta") for name in rule.hf]
        size = tuple(rule.merge(parts, shape).shape)
        found.append(Place(rule, key, at, (layers, shape.experts)[: len(at)], size))
    return found


# -- Hugging Face to Megatron -----------------------------------------------------------------------------------------


def to_megatron(source: Path, target: Path, *, vocab_multiple: int = 128) -> None:
    """Write the Hugging Face folder `source` as a Megatron checkpoint. Collective over the ranks of torchrun.

    The vocabulary is padded with zeros to a multiple, as Megatron-LM's `--make-vocab-size-divisible-by`; loading pads
    or cuts it further. UnusableInput names a missing, unexpected or misshapen tensor.
    """
    hf = read_config(source)
    table = places(hf, str(source), vocab_multiple=vocab_multiple)
    shape = shape_of(hf, tp=vocab_multiple)
    folder = TensorFolder(source)
    known = {name for place in table for name in place.rule.hf}
    folder.refuse_unexpected(known, tied=bool(hf.get("tie_word_embeddings", False)))
    if missing := sorted(known - folder.names()):
        raise UnusableInput(f"model.path = {source}: tensor {missing[0]} is missing (and {len(missing) - 1} more)")
    with _written(target) as (temporary, rank, size):
        name = f"__{rank}_0.distcp"
        records = []
        with open(temporary / name, "wb") as file:
            for place in _share(table, rank, size):
                parts = [folder.read(each, expected_shape(each, shape)) for each in place.rule.hf]
                if len(types := {part.dtype for part in parts}) > 1:
                    raise UnusableInput(f"model.path = {source}: {' and '.join(place.rule.hf)} differ in type: {types}")
                tensor = place.rule.merge(parts, shape).contiguous()
                start = file.tell()
                # Views would be stored with all that they are views of.
                whole = tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
                _save(whole.view(*(1 for _ in place.at), *whole.shape), file)
                dtype = str(tensor.dtype).removeprefix("torch.")
                records.append([place.key, list(place.at), dtype, start, file.tell() - start, name])
        everything = [record for part in _gathered(records, size) for record in part]
        if rank == 0:
            by_place = {(place.key, place.at): place for place in table}
            _write_index(temporary, [(by_place[key, tuple(at)], *rest) for key, at, *rest in everything])
            _copy_beside(source, temporary)


def _save(tensor: torch.Tensor, file: IO[bytes]) -> None:
    """`torch.save` without the ZIP format's checksums, which take most of its time and which torch does not read."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensor, file)
    finally:
        torch.serialization.set_crc32_options(before)


def _write_index(folder: Path, records: Sequence[tuple[Place, str, int, int, str]]) -> None:
    """What Megatron and torch read first: which chunk of which tensor lies where. UnusableInput for mixed types."""
    tensors: dict[str, TensorStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for place, dtype_name, start, length, file in records:
        dtype = getattr(torch, dtype_name)
        offsets = torch.Size((*place.at, *(0 for _ in place.shape)))
        sizes = torch.Size((*(1 for _ in place.at), *place.shape))
        entry = tensors.setdefault(
            place.key,
            TensorStorageMetadata(TensorProperties(dtype), torch.Size((*place.stacked, *place.shape)), []),
        )
        if entry.properties.dtype != dtype:
            raise UnusableInput(
                f"tensor {place.rule.hf[0]} is {dtype_name}, but those of the layers before it are"
                f" {str(entry.properties.dtype).removeprefix('torch.')}: Megatron stores all layers as one tensor"
            )
        entry.chunks.append(ChunkStorageMetadata(offsets, sizes))
        storage[MetadataIndex(place.key, offsets)] = _StorageInfo(file, start, length)
    (folder / METADATA).write_bytes(pickle.dumps(Metadata(dict(tensors), storage_data=storage)))
    backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    backends |= {"common_backend": "torch", "common_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(backends))
    torch.save({}, folder / "common.pt")


# -- Megatron to Hugging Face -----------------------------------------------------------------------------------------


def to_hf(source: Path, target: Path, *, model: Path, max_shard_bytes: int = 4 << 30) -> None:
    """Write a Megatron checkpoint, saved at any layout, as a Hugging Face folder. Collective over torchrun's ranks.

    `model`: a folder with the model's config.json and tokenizer. The vocabulary's padding is cut. UnusableInput names a
    key that is missing, misshapen or of no parameter, and refuses an index that would run code.
    """
    hf = read_config(model)
    table = places(hf, str(model))
    if problem := index_problem(source):
        raise UnusableInput(f"{source}: {problem}")
    index: Metadata = pickle.loads((source / METADATA).read_bytes())
    _check_keys(source, table, index)
    chunks: dict[str, list[tuple[torch.Size, torch.Size]]] = {}
    for key in {place.key for place in table}:
        entry = index.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata)
        chunks[key] = [(chunk.offsets, chunk.sizes) for chunk in entry.chunks]
    shape = shape_of(hf, tp=1)
    files = _files(table, index, shape, max_shard_bytes)
    with _written(target) as (temporary, rank, size):
        for name, members in list(files.items())[rank::size]:
            described = _described(members, index, shape)
            write_tensors(temporary / name, described, _tensors(source, members, index, chunks, shape))
        _gathered(None, size)
        if rank == 0:
            if len(files) > 1:
                sizes = [place_bytes(place, index, shape) for place in table]
                weight_map = {
                    hf_name: name for name, members in files.items() for p in members for hf_name in p.rule.hf
                }
                (temporary / INDEX).write_text(
                    json.dumps({"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}, indent=2)
                )
            _copy_beside(model, temporary)


def _check_keys(source: Path, table: Sequence[Place], index: Metadata) -> None:
    """UnusableInput for what a checkpoint lacks, holds besides its model, or holds in another shape."""
    held = {key: tuple(e.size) for key, e in index.state_dict_metadata.items() if isinstance(e, TensorStorageMetadata)}
    for place in table:
        if place.key not in held:
            raise UnusableInput(f"{source}: tensor {place.key}, of which {place.rule.hf[0]} is made, is missing")
    known = {place.key for place in table}
    for key in held:
        if key not in known and not key.startswith(("optimizer.", "ema.")):
            raise UnusableInput(f"{source}: unexpected tensor {key}; the model of config.json has none of that name")
    for place in table:
        wanted, found = (*place.stacked, *place.shape), held[place.key]
        padded = place.rule.shard == "vocab" and found[0] >= wanted[0] and found[1:] == wanted[1:]
        if found != wanted and not padded:
            raise UnusableInput(f"{source}: tensor {place.key} has shape {found}, expected {wanted}")


def _files(table: Sequence[Place], index: Metadata, shape: Shape, limit: int) -> dict[str, list[Place]]:
    """The safetensors files to write, with what goes into each."""
    parts: list[list[Place]] = []
    held = limit + 1
    for place in table:
        size = place_bytes(place, index, shape)
        if held + size > limit:
            parts.append([])
            held = 0
        parts[-1].append(place)
        held += size
    if len(parts) == 1:
        return {SINGLE: parts[0]}
    return {f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts)}


def place_bytes(place: Place, index: Metadata, shape: Shape) -> int:
    """Bytes of a parameter's Hugging Face tensors."""
    return sum(tensor.nbytes for _, tensor in _described([place], index, shape))


def _described(members: Sequence[Place], index: Metadata, shape: Shape) -> list[tuple[str, torch.Tensor]]:
    """(name, meta tensor) of what `members` become."""
    found = []
    for place in members:
        entry = index.state_dict_metadata[place.key]
        assert isinstance(entry, TensorStorageMetadata)
        for name in place.rule.hf:
            size = expected_shape(name, shape)
            found.append((name, torch.empty(size, dtype=entry.properties.dtype, device="meta")))
    return found


def _tensors(
    source: Path,
    members: Sequence[Place],
    index: Metadata,
    chunks: Mapping[str, Sequence[tuple[torch.Size, torch.Size]]],
    shape: Shape,
) -> Iterator[torch.Tensor]:
    """The Hugging Face tensors of `members`, one parameter at a time, from all chunks that hold a part of it."""
    for place in members:
        entry = index.state_dict_metadata[place.key]
        assert isinstance(entry, TensorStorageMetadata)
        lead = len(place.at)
        whole = None
        for offsets, sizes in chunks[place.key]:
            if tuple(offsets[:lead]) != place.at:
                continue
            part = _read_chunk(source, index.storage_data[MetadataIndex(place.key, offsets)]).view(sizes[lead:])
            if tuple(part.shape) == tuple(entry.size[lead:]):
                whole = part
                break
            if whole is None:
                whole = torch.empty(entry.size[lead:], dtype=part.dtype)
            where = tuple(slice(o, o + n) for o, n in zip(offsets[lead:], sizes[lead:], strict=True))
            whole[where] = part
        if whole is None:
            raise UnusableInput(f"{source}: tensor {place.key} lacks the part that {place.rule.hf[0]} is made of")
        yield from place.rule.split(whole, shape)


def _read_chunk(source: Path, info: _StorageInfo) -> torch.Tensor:
    with open(source / info.relative_path, "rb") as file:
        file.seek(info.offset)
        tensor: torch.Tensor = torch.load(io.BytesIO(file.read(info.length)), weights_only=True, map_location="cpu")
    return tensor


# -- both ways --------------------------------------------------------------------------------------------------------


@contextmanager
def met() -> Iterator[None]:
    """The ranks of torchrun, met for the time of a block; nothing where there is one, or where they have met already.

    They part at the end, also when all have been told what stops them. After other errors some may never come.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo")
    try:
        yield
    except _Told:
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


@contextmanager
def _written(target: Path) -> Iterator[tuple[Path, int, int]]:
    """A folder that becomes `target` when all ranks are done, this process' rank and their number.

    UnusableInput when `target` is there already, and on every rank what any one of them fails with.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    temporary = target.with_name(f".{target.name}.writing")
    if target.exists():
        raise UnusableInput(f"{target} is there already: choose another folder, or remove it")
    with met():
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        _gathered(None, size)
        try:
            yield temporary, rank, size
            _gathered(None, size)
        except _Told:
            raise
        except (UnusableInput, OSError) as error:
            if size > 1:  # the others wait for this rank at their next meeting
                _gathered(None, size, problem=str(error))
            raise
        if rank == 0:
            os.replace(temporary, target)
        _gathered(None, size)


class _Told(UnusableInput):
    """A rank could not go on, and all have heard of it."""


def _gathered(value: Any, size: int, *, problem: str = "") -> list[Any]:
    """Every rank's value. UnusableInput on all of them, with the words of the first, when one has a problem."""
    if size == 1:
        return [value]
    found = gather_json([problem, value], dist.group.WORLD)
    if told := next((problem for problem, _ in found if problem), ""):
        raise _Told(told)
    return [value for _, value in found]


def _share(table: Sequence[Place], rank: int, size: int) -> Sequence[Place]:
    """This rank's stretch of the parameters."""
    return table[len(table) * rank // size : len(table) * (rank + 1) // size]


def _copy_beside(source: Path, target: Path) -> None:
    for name in ("config.json", *TOKENIZER_FILES):
        if (source / name).exists():
            shutil.copy2(source / name, target / name)
