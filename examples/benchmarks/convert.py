"""Convert a random 2 GB model there and back: peak memory against the largest file, time against copying the files.

    python examples/benchmarks/convert.py [--folder DIR] [--gigabytes 2]

Each direction runs in a process of its own. `resident` is the largest resident set of that process, mapped pages of
input files included; `start` is what it was with everything imported. Seconds are of the conversion, without imports,
up to data written to the page cache, as the copy's are.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from megatron_urlvr.policy.hf.families import family_of, rules_for, shape_of
from megatron_urlvr.policy.hf.folder import INDEX, write_tensors
from megatron_urlvr.policy.hf.rules import expected_shape

CHILD = """
import json, resource, sys, time
from pathlib import Path
import torch
from megatron_urlvr.policy.convert import to_hf, to_megatron
torch.set_num_threads(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
way, source, target = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
before, started = peak(), time.perf_counter()
to_megatron(source, target) if way == "to_megatron" else to_hf(source, target, model=source, max_shard_bytes=SHARD)
print(json.dumps({"seconds": time.perf_counter() - started, "resident": peak(), "start": before}))
"""
SHARD = 512_000_000
"""Largest safetensors file, bytes."""


def config(gigabytes: float) -> dict[str, object]:
    """A Llama-like config of bfloat16 weights of about this size."""
    hidden, ffn, vocab = 2048, 5632, 32000
    layer = hidden * hidden * 2 + hidden * 512 * 2 + 3 * hidden * ffn
    layers = max(round((gigabytes * 1e9 / 2 - 2 * vocab * hidden) / layer), 1)
    sizes = {"hidden_size": hidden, "intermediate_size": ffn, "vocab_size": vocab, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 4096}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5, **sizes, **heads}


def write_model(folder: Path, hf: dict[str, object]) -> None:
    """Random weights, in files of at most SHARD bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf))
    shape = shape_of(hf, tp=1)
    table = rules_for(family_of(hf, str(folder)), int(str(hf["num_hidden_layers"])), tied=False)
    names = [name for rule, _ in table for name in rule.hf]
    files: list[list[str]] = [[]]
    held = 0
    for name in names:
        size = 2 * torch.Size(expected_shape(name, shape)).numel()
        if held + size > SHARD:
            files.append([])
            held = 0
        files[-1].append(name)
        held += size
    weight_map = {}
    for i, members in enumerate(files):
        file = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        described = [(n, torch.empty(expected_shape(n, shape), dtype=torch.bfloat16, device="meta")) for n in members]
        write_tensors(folder / file, described, (torch.randn(t.shape).to(t.dtype) for _, t in described))
        weight_map |= dict.fromkeys(members, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def converted(way: str, source: Path, target: Path) -> dict[str, float]:
    """Seconds and resident gigabytes of one conversion, in its own process."""
    code = CHILD.replace("SHARD", str(SHARD))
    done = subprocess.run(
        [sys.executable, "-c", code, way, str(source), str(target)], stdout=subprocess.PIPE, check=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def copied(source: Path, target: Path) -> float:
    """Seconds to copy a folder's files."""
    started = time.perf_counter()
    shutil.copytree(source, target)
    return time.perf_counter() - started


def bits(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a folder, by name."""
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    for name in sorted(weight_map):
        with safe_open(folder / weight_map[name], framework="pt") as file:
            yield name, file.get_tensor(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder without it")
    parser.add_argument("--gigabytes", type=float, default=2.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        root = Path(name)
        write_model(root / "hf", config(arguments.gigabytes))
        files = [file.stat().st_size for file in (root / "hf").glob("*.safetensors")]
        print(f"{sum(files) / 1e9:.2f} GB in {len(files)} files, the largest {max(files) / 1e9:.2f} GB")
        seconds = copied(root / "hf", root / "copy")
        shutil.rmtree(root / "copy")
        print(f"copying the files: {seconds:.1f} s")
        for way, source, target in (("to_megatron", "hf", "megatron"), ("to_hf", "megatron", "back")):
            found = converted(way, root / source, root / target)
            print(
                f"{way}: {found['seconds']:.1f} s ({found['seconds'] / seconds:.2f} x copying), resident"
                f" {found['resident']:.2f} GB at most ({found['start']:.2f} GB of it at the start)"
            )
        same = all(
            a[0] == b[0] and torch.equal(a[1], b[1])
            for a, b in zip(bits(root / "hf"), bits(root / "back"), strict=True)
        )
        print(f"bits after both ways: {'the same' if same else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
