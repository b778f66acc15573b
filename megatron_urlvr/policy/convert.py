"""Hugging Face folders to Megatron's distributed checkpoints and back: rows of tensors, put into another order.

    safetensors ─► rows, in the order of rule.merge ─► one chunk of a `torch_dist` checkpoint, any layout reads it
    chunks of any layout's checkpoint ─► rows, in the order of rule.split ─► safetensors with an index

Rows go from file to file through a small buffer. Only what a checkpoint holds in columns (tensor parallel) is put
together in memory, a parameter at a time. Ranks (torchrun) share the files among them; bits and types are kept.
Megatron stores a parameter of all layers under one key, stacked: `decoder.layers.mlp.linear_fc2.weight`,
`[layers, ...]`, experts stacked once more behind the layers.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist

from ..distributed.layout import gather_json
from ..exit_codes import DISK_FULL, UnusableInput
from .hf.families import TRANSFORMER_ENGINE_NAMES, family_of, rules_for, shape_of
from .hf.folder import INDEX, SINGLE, TOKENIZER_FILES, TYPES, TensorFolder, header_of, read_config
from .hf.rules import Rule, Shape, expected_shape
from .rows import Copier, Rows, numbered
from .torch_dist import Checkpoint, Chunk, write_archive, write_index

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
        parts = [expected_shape(name, shape) for name in rule.hf]
        rows = rule.merge([numbered(part, 1) for part in parts], shape).shape[0]
        size = (rows, *parts[0][1:])
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
        with open(temporary / name, "x+b") as file, Copier(file) as copier:
            written = [_write_chunk(place, folder, shape, file, copier) for place in _share(table, rank, size)]
        everything = [(*record, by) for by, part in enumerate(_gathered(written, size)) for record in part]
        if rank == 0:
            write_index(temporary, _indexed(table, everything))
            _copy_beside(source, temporary)


def _write_chunk(
    place: Place, folder: TensorFolder, shape: Shape, file: IO[bytes], copier: Copier
) -> tuple[str, int, int]:
    """Write one parameter as a chunk; returns its type, where it begins in the file, and its length.

    UnusableInput when the tensors that it is made of are not as expected, or differ in type.
    """
    parts = [folder.locate(each, expected_shape(each, shape)) for each in place.rule.hf]
    if len(types := sorted({_name(part.dtype) for part in parts})) > 1:
        raise UnusableInput(f"{parts[0].file}: {' and '.join(place.rule.hf)} differ in type: {', '.join(types)}")
    dtype, start = parts[0].dtype, file.tell()
    at, length = write_archive(file, (*(1 for _ in place.at), *place.shape), dtype)
    held, numbers, first = [], [], 1
    for part in parts:
        held.append(Rows(first, part.shape[0], part.file, part.at))
        numbers.append(numbered(part.shape, first))
        first += part.shape[0]
    copier.copy(place.rule.merge(numbers, shape), held, _row_bytes(place.shape, dtype), at)
    return _name(dtype), start, length


def _indexed(
    table: Sequence[Place], written: Sequence[tuple[str, int, int, int]]
) -> dict[str, tuple[tuple[int, ...], torch.dtype, list[Chunk]]]:
    """What an index holds. `written`: of each place its type, start, length and rank. UnusableInput for mixed types."""
    found: dict[str, tuple[tuple[int, ...], torch.dtype, list[Chunk]]] = {}
    for place, (name, start, length, rank) in zip(table, written, strict=True):
        _, dtype, chunks = found.setdefault(place.key, ((*place.stacked, *place.shape), getattr(torch, name), []))
        if _name(dtype) != name:
            raise UnusableInput(
                f"tensor {place.rule.hf[0]} is {name}, but those of the layers before it are {_name(dtype)}: Megatron"
                " stores all layers as one tensor"
            )
        offsets, sizes = (*place.at, *(0 for _ in place.shape)), (*(1 for _ in place.at), *place.shape)
        chunks.append(Chunk(offsets, sizes, f"__{rank}_0.distcp", start, length))
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _row_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    return torch.Size(shape[1:]).numel() * dtype.itemsize


# -- Megatron to Hugging Face -----------------------------------------------------------------------------------------


def to_hf(source: Path, target: Path, *, model: Path, max_shard_bytes: int = 4 << 30) -> None:
    """Write a Megatron checkpoint, saved at any layout, as a Hugging Face folder. Collective over torchrun's ranks.

    `model`: a folder with the model's config.json and tokenizer. The vocabulary's padding is cut. UnusableInput names a
    key that is missing, misshapen or of no parameter, and refuses an index that would run code.
    """
    hf = read_config(model)
    table = places(hf, str(model))
    checkpoint = Checkpoint(source)
    _check_keys(checkpoint, table)
    shape = shape_of(hf, tp=1)
    described = [(place, _described(place, checkpoint, shape)) for place in table]
    files = _files(described, max_shard_bytes)
    with _written(target) as (temporary, rank, size):
        for name, members in list(files.items())[rank::size]:
            _write_file(temporary / name, members, checkpoint, shape)
        _gathered(None, size)
        if rank == 0:
            if len(files) > 1:
                total = sum(tensor.nbytes for _, tensors in described for _, tensor in tensors)
                weight_map = {each: name for name, part in files.items() for _, tensors in part for each, _ in tensors}
                index = {"metadata": {"total_size": total}, "weight_map": weight_map}
                (temporary / INDEX).write_text(json.dumps(index, indent=2))
            _copy_beside(model, temporary)


def _check_keys(checkpoint: Checkpoint, table: Sequence[Place]) -> None:
    """UnusableInput for what a checkpoint lacks, holds besides its model, or holds in another shape or type."""
    source, shapes = checkpoint.folder, checkpoint.shapes
    for place in table:
        if place.key not in shapes:
            raise UnusableInput(f"{source}: tensor {place.key}, of which {place.rule.hf[0]} is made, is missing")
    known = {place.key for place in table}
    for key in shapes:
        if key not in known and not key.startswith(("optimizer.", "ema.")):
            raise UnusableInput(f"{source}: unexpected tensor {key}; the model of config.json has none of that name")
    for place in table:
        wanted, found = (*place.stacked, *place.shape), shapes[place.key]
        padded = place.rule.shard == "vocab" and found[0] >= wanted[0] and found[1:] == wanted[1:]
        if found != wanted and not padded:
            raise UnusableInput(f"{source}: tensor {place.key} has shape {found}, expected {wanted}")
        if (dtype := checkpoint.dtypes[place.key]) not in TYPES.values():
            supported = ", ".join(map(_name, TYPES.values()))
            raise UnusableInput(f"{source}: tensor {place.key} is {_name(dtype)}; supported: {supported}")


Described = tuple[Place, list[tuple[str, torch.Tensor]]]
"""A parameter, and the names of what becomes of it, with tensors without values: shapes and types."""


def _described(place: Place, checkpoint: Checkpoint, shape: Shape) -> list[tuple[str, torch.Tensor]]:
    dtype = checkpoint.dtypes[place.key]
    return [(name, torch.empty(expected_shape(name, shape), dtype=dtype, device="meta")) for name in place.rule.hf]


def _files(described: Sequence[Described], limit: int) -> dict[str, list[Described]]:
    """The safetensors files to write, with what goes into each."""
    parts: list[list[Described]] = []
    held = limit + 1
    for place, tensors in described:
        size = sum(tensor.nbytes for _, tensor in tensors)
        if held + size > limit:
            parts.append([])
            held = 0
        parts[-1].append((place, tensors))
        held += size
    if len(parts) == 1:
        return {SINGLE: parts[0]}
    return {f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts)}


def _write_file(path: Path, members: Sequence[Described], checkpoint: Checkpoint, shape: Shape) -> None:
    """Write one safetensors file, parameter by parameter."""
    header, places_in_file = header_of([each for _, tensors in members for each in tensors])
    offsets = iter(places_in_file)
    with open(path, "xb") as file, Copier(file) as copier:
        file.write(header)
        file.flush()
        for place, _ in members:
            held = checkpoint.entry(place.key, place.at)
            whole = checkpoint.shapes[place.key][len(place.at) :]
            row_bytes = _row_bytes(whole, checkpoint.dtypes[place.key])
            for numbers in place.rule.split(numbered(whole, 1), shape):
                copier.copy(numbers, held, row_bytes, next(offsets))


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
    if _is_there(target):
        raise UnusableInput(f"{target} is there already: choose another folder, or remove it")
    temporary = target.with_name(f".{target.name}.writing")
    with met():
        try:
            if rank == 0:
                _make_anew(temporary, target)
            _gathered(None, size)
            yield temporary, rank, size
            _gathered(None, size)
        except (UnusableInput, OSError) as error:
            try:
                if size > 1 and not isinstance(error, _Told):  # the others wait for this rank at their next meeting
                    _gathered(None, size, problem=str(error))
                raise
            finally:
                if rank == 0:
                    shutil.rmtree(temporary, ignore_errors=True)
        if rank == 0:
            os.replace(temporary, target)
        _gathered(None, size)


def _is_there(target: Path) -> bool:
    try:
        return target.exists()
    except OSError as error:
        raise _not_writable(target, error) from None


def _make_anew(temporary: Path, target: Path) -> None:
    """An empty folder. UnusableInput when the place of `target` lets nobody make one; a full disk is an OSError."""
    try:
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise _not_writable(target, error) from None


def _not_writable(target: Path, error: OSError) -> UnusableInput:
    return UnusableInput(f"{target} cannot be written: {error.strerror}; choose another folder")


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
