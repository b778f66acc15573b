"""Groups as JSON, exact to the bit: what is written to `rollouts/`, replayed, and handed between ranks."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard

from ..exit_codes import UnusableInput
from ..types import STATISTICS, Group, Prompt, Sample, Span, TokenStats


def pack_floats(tensor: torch.Tensor | None) -> str | None:
    """float32 values as base64 of their little-endian bytes."""
    if tensor is None:
        return None
    return base64.b64encode(tensor.detach().cpu().numpy().astype("<f4").tobytes()).decode()


def unpack_floats(text: str | None) -> torch.Tensor | None:
    """Inverse of `pack_floats`: a `[T]` float32 tensor."""
    return None if text is None else torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype="<f4").copy())


def group_to_record(group: Group) -> dict[str, Any]:
    """A group as a JSON-able object. Answers, classes and statistics come along; labels are never in a group."""
    prompt = group.prompt
    samples = []
    for sample in group.samples:
        record: dict[str, Any] = {
            "tokens": sample.tokens,
            "text": sample.text,
            "finish": sample.finish,
            "version": sample.version,
            "answer": sample.answer,
            "logp": pack_floats(sample.logp),
        }
        if sample.spans:
            record["spans"] = [list(span) for span in sample.spans]
        if sample.stats is not None:
            record["stats"] = {name: pack_floats(sample.stats.get(name)) for name in sorted(sample.stats.present())}
        samples.append(record)
    whole = {
        "prompt": {"id": prompt.id, "text": prompt.text, "tokens": list(prompt.tokens), "fields": dict(prompt.fields)},
        "classes": group.classes,
        "signals": {name: pack_floats(value) for name, value in group.signals.items()},
        "samples": samples,
    }
    if group.beside:
        whole["beside"] = [group_to_record(each) for each in group.beside]
    return whole


def group_from_record(record: Mapping[str, Any]) -> Group:
    """Inverse of `group_to_record`. KeyError or TypeError on a record of another shape."""
    source = record["prompt"]
    prompt = Prompt(source["id"], source["text"], tuple(source["tokens"]), source["fields"])
    samples = []
    for index, item in enumerate(record["samples"]):
        stats = item.get("stats")
        if stats is not None:
            stats = TokenStats(**{name: unpack_floats(value) for name, value in stats.items() if name in STATISTICS})
        samples.append(
            Sample(
                prompt_id=prompt.id,
                index=index,
                tokens=list(item["tokens"]),
                text=item["text"],
                finish=item["finish"],
                logp=unpack_floats(item["logp"]),
                version=item["version"],
                answer=item["answer"],
                stats=stats,
                spans=tuple(Span(*span) for span in item.get("spans", ())),
            )
        )
    signals = {name: unpack_floats(value) for name, value in record.get("signals", {}).items()}
    beside = [group_from_record(each) for each in record.get("beside", ())]
    return Group(prompt, samples, list(record["classes"]), {k: v for k, v in signals.items() if v is not None}, beside)


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object a line, zstd-compressed, written under a temporary name and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    with open(temporary, "wb") as raw, zstandard.ZstdCompressor(level=3).stream_writer(raw) as file:
        for record in records:
            file.write(json.dumps(record).encode() + b"\n")
    temporary.rename(path)


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file that `write_records` wrote. UnusableInput for another file, or a torn one."""
    try:
        with open(path, "rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
            for line in io.TextIOWrapper(stream, encoding="utf-8"):
                yield json.loads(line)
    except (zstandard.ZstdError, ValueError) as error:
        raise UnusableInput(f"{path} is no file of recorded rollouts: {error}.") from error


def read_groups(path: Path) -> list[Group]:
    """The groups of a file that `write_records` wrote. UnusableInput for another file, or a torn one."""
    try:
        return [group_from_record(record) for record in read_records(path)]
    except (KeyError, TypeError, AttributeError) as error:
        raise UnusableInput(f"{path} is no file of recorded rollouts: {error!r}.") from error
