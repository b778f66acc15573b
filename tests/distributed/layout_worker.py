"""One rank of layouts under test: computes every case in each, trains end to end, and leaves what it saw in files."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from layout_cases import Case, check_checkpoint, config_of, observe, sampling_config

from megatron_urlvr.train import main as train


def run(job: dict, folder: Path) -> None:
    """`job`: the `parallel` settings of each layout, and the cases' files."""
    torch.set_num_threads(1)
    for name, parallel in job["layouts"].items():
        out = folder / name
        out.mkdir(exist_ok=True)
        for fields in job["cases"]:
            case = Case(fields["name"], Path(fields["model"]), Path(fields["recorded"]), fields["vocab"])
            config = config_of(case, out / f"{case.name}_run", parallel=parallel)
            torch.save(observe(config), out / f"{case.name}_{os.environ['RANK']}.pt")
            check_checkpoint(config, out / f"{case.name}_checkpoints")
            assert train(config) == 0
        assert train(sampling_config(case, out / "sampled", parallel=parallel)) == 0


if __name__ == "__main__":
    run(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
