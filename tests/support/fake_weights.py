"""Weights as the fake server takes them: members of a process group, buckets, checksums."""

from __future__ import annotations

import datetime
import hashlib
from typing import Any

import torch
import torch.distributed as dist


def checksums(loaded: dict[str, torch.Tensor]) -> dict[str, str]:
    """Of tensors by name, joined and padded as SGLang has them."""
    held = dict(loaded)
    for joined, parts in (("qkv_proj", ["q_proj", "k_proj", "v_proj"]), ("gate_up_proj", ["gate_proj", "up_proj"])):
        for name in [name for name in held if parts[0] in name]:
            held[name.replace(parts[0], joined)] = torch.cat([held.pop(name.replace(parts[0], p)) for p in parts])
    for name in held.keys() & {"model.embed_tokens.weight", "lm_head.weight"}:
        held[name] = torch.nn.functional.pad(held[name], (0, 0, 0, -len(held[name]) % 64))
    return {name: hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest()[:16] for name, t in held.items()}


def joined(body: dict[str, Any]) -> Any:
    """Join as another process would; the registry of groups belongs to the trainer, which is in this process."""
    timeout = datetime.timedelta(seconds=10)
    store = dist.TCPStore(body["master_address"], body["master_port"], is_master=False, timeout=timeout)
    for prefix in (body["group_name"], f"{body['group_name']}/", "cpu/"):
        store = dist.PrefixStore(prefix, store)
    return dist.ProcessGroupGloo(store, body["rank_offset"], body["world_size"], timeout)


def received(group: Any, body: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of one bucket, by name, one broadcast each or all in one flat tensor."""
    kinds = [getattr(torch, name) for name in body["dtypes"]]
    sizes = [torch.Size(shape).numel() * kind.itemsize for shape, kind in zip(body["shapes"], kinds, strict=True)]
    options = dist.BroadcastOptions()
    options.rootRank = 0
    if "load_format" not in body:
        found = [torch.empty(shape, dtype=kind) for shape, kind in zip(body["shapes"], kinds, strict=True)]
        for work in [group.broadcast([each], options) for each in found]:
            work.wait()
        return dict(zip(body["names"], found, strict=True))
    flat = torch.empty(sum(sizes), dtype=torch.uint8)
    group.broadcast([flat], options).wait()
    parts = flat.split(sizes)
    return {
        name: part.view(kind).reshape(shape)
        for name, part, kind, shape in zip(body["names"], parts, kinds, body["shapes"], strict=True)
    }
