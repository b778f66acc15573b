"""One rank of layouts under test: computes every case in each, trains end to end, and leaves what it saw in files."""

from __future__ import annotations

import gc
import json
import os
import sys
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist
from checkpoint_cases import check_checkpoint, hand_on
from layout_cases import Case, config_of, observe, sampling_config, score_families
from length_cases import model_of, observe_lengths
from tiny_models import FAMILIES

from megatron_urlvr.train import main as train


def run(job: dict, folder: Path) -> None:
    """`job`: the `parallel` settings of each layout, the cases' files, the folders of `"models"` by name, for some of
    these the layouts of a chain of checkpoints (`"chains"`), and the layouts that train on rows of many lengths
    (`"lengths"`); with `"train"` all that a layout does is looked at, and not the one step alone."""
    torch.set_num_threads(1)
    meetings = count()
    models = {name: Path(path) for name, path in job["models"].items()}
    for model, chain in job["chains"].items():
        found = []
        for parallel in chain.values():
            meet(folder, next(meetings))
            found.append(hand_on(models[model], folder / f"chain_{model}", parallel))
        (folder / f"chain_{model}_{os.environ['RANK']}.json").write_text(json.dumps(found))
    for name, parallel in job["lengths"].items():
        meet(folder, next(meetings))
        seen = observe_lengths(models[model_of(name)], parallel, padded=not name.endswith("_unpadded"))
        torch.save(seen, folder / f"lengths_{name}_{os.environ['RANK']}.pt")
    cases = [Case(c["name"], Path(c["model"]), Path(c["recorded"]), c["vocab"]) for c in job["cases"]]
    for name, parallel in job["layouts"].items():
        out = folder / name
        out.mkdir(exist_ok=True)
        if job["train"]:
            meet(folder, next(meetings))
            folders = {family: models[family] for family in FAMILIES}
            torch.save(score_families(folders, parallel), out / f"families_{os.environ['RANK']}.pt")
        for case in cases:
            config = config_of(case, out / f"{case.name}_run", parallel=parallel)
            meet(folder, next(meetings))
            torch.save(observe(config), out / f"{case.name}_{os.environ['RANK']}.pt")
            if job["train"]:
                meet(folder, next(meetings))
                check_checkpoint(config, out / f"{case.name}_checkpoints")
                meet(folder, next(meetings))
                assert train(config) == 0
        if job["train"]:
            meet(folder, next(meetings))
            assert train(sampling_config(cases[-1], out / "sampled", parallel=parallel)) == 0


def meet(folder: Path, number: int) -> None:
    """Form the process group that the next part will find and leave. The first part forms it as torchrun's ranks do;
    doing so again through one port would race with the group that is being left."""
    gc.collect()  # a store that is left behind writes to its file when it goes, which must not be on a full disk
    if number > 0:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting_{number}", rank=rank, world_size=size)


if __name__ == "__main__":
    run(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
