"""Convert a random 2 GB model there and back: peak memory against the largest file, time against copying the files.

    python examples/benchmarks/convert.py [--folder DIR] [--gigabytes 2] [--rounds 3]

The contenders take turns; ratios are of the same round. `copy` is `shutil.copytree`, which copies inside the kernel;
`read, write, fsync` reads into memory, writes, and waits for the disk. Each direction runs in a process of its own, in
one thread. `resident` is the largest resident set of that process, mapped pages of files included; `start` is what it
was with everything imported. Seconds are of the conversion, without imports, up to data written to the page cache, as
the copy's are. Before each all is on the disk, what is read is in the page cache, and the same was done once and
removed: a virtual machine hands out memory that it never used at a fraction of the speed, to whoever comes first.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from megatron_urlvr.policy.hf.families import family_of, rules_for, shape_of
from megatron_urlvr.policy.hf.folder import INDEX, write_folder
from megatron_urlvr.policy.hf.rules import expected_shape

CHILD = """
import json, os, re, shutil, sys, time
from functools import partial
from pathlib import Path
import torch
from megatron_urlvr.policy.convert import to_hf, to_megatron
torch.set_num_threads(1)
# Not getrusage: after an exec it still counts what the parent held at the fork.
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9
way, source, target = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
convert = to_megatron if way == "to_megatron" else partial(to_hf, model=source, max_shard_bytes=SHARD)
before = peak()
convert(source, target)
shutil.rmtree(target)
os.sync()
started = time.perf_counter()
convert(source, target)
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
    shape = shape_of(hf, tp=1)
    table = rules_for(family_of(hf, str(folder)), int(str(hf["num_hidden_layers"])), tied=False)
    names = (name for rule, _ in table for name in rule.hf)
    tensors = ((name, torch.randn(expected_shape(name, shape)).bfloat16()) for name in names)
    write_folder(folder, tensors, config=hf, tokenizer_from=None, max_shard_bytes=SHARD)


def converted(way: str, source: Path, target: Path) -> dict[str, float]:
    """Seconds and resident gigabytes of one conversion, in its own process."""
    code = CHILD.replace("SHARD", str(SHARD))
    done = subprocess.run(
        [sys.executable, "-c", code, way, str(source), str(target)], stdout=subprocess.PIPE, check=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def copied(source: Path, target: Path) -> None:
    """Copy a folder's files, as fast as the kernel can."""
    shutil.copytree(source, target)


def read_and_written(source: Path, target: Path) -> None:
    """Copy a folder's files through memory, to the disk."""
    target.mkdir()
    buffer = memoryview(bytearray(256 << 10))
    for file in source.iterdir():
        with open(file, "rb", buffering=0) as reading, open(target / file.name, "wb", buffering=0) as writing:
            while done := reading.readinto(buffer):
                writing.write(buffer[:done])
            os.fsync(writing.fileno())


def timed(copy: Callable[[Path, Path], None], root: Path) -> float:
    """Seconds that a way to copy takes."""
    copy(root / "hf", root / "copy")
    shutil.rmtree(root / "copy")
    os.sync()
    started = time.perf_counter()
    copy(root / "hf", root / "copy")
    seconds = time.perf_counter() - started
    shutil.rmtree(root / "copy")
    return seconds


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
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        root = Path(name)
        write_model(root / "hf", config(arguments.gigabytes))
        files = [file.stat().st_size for file in (root / "hf").glob("*.safetensors")]
        print(f"{sum(files) / 1e9:.2f} GB in {len(files)} files, the largest {max(files) / 1e9:.2f} GB")
        seconds: dict[str, list[float]] = {}
        for _ in range(arguments.rounds):
            for way in ("megatron", "back"):
                shutil.rmtree(root / way, ignore_errors=True)
            seconds.setdefault("copy", []).append(timed(copied, root))
            for way, source, target in (("to_megatron", "hf", "megatron"), ("to_hf", "megatron", "back")):
                found = converted(way, root / source, root / target)
                seconds.setdefault(way, []).append(found["seconds"])
                print(
                    f"{way}: {found['seconds']:.2f} s, resident {found['resident']:.2f} GB at most"
                    f" ({found['start']:.2f} GB of it at the start)"
                )
            seconds.setdefault("read, write, fsync", []).append(timed(read_and_written, root))
        for name, all_seconds in seconds.items():
            ratios = sorted(one / base for one, base in zip(all_seconds, seconds["copy"], strict=True))
            print(
                f"{name}: median {statistics.median(all_seconds):.2f} s, {statistics.median(ratios):.2f} x copy"
                f" ({ratios[0]:.2f} to {ratios[-1]:.2f} in {len(ratios)} rounds)"
            )
        same = all(
            a[0] == b[0] and torch.equal(a[1], b[1])
            for a, b in zip(bits(root / "hf"), bits(root / "back"), strict=True)
        )
        print(f"bits after both ways: {'the same' if same else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
