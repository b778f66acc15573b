"""One rank of a layout under test: computes every case on it, trains end to end, and leaves what it saw in a file."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from layout_cases import Case, check_checkpoint, config_of, observe, sampling_config

from megatron_urlvr.train import main as train


def run(job: dict, out: Path) -> None:
    """`job`: the layout's `parallel` settings and the cases' files."""
    torch.set_num_threads(1)
    rank = os.environ["RANK"]
    for fields in job["cases"]:
        case = Case(fields["name"], Path(fields["model"]), Path(fields["recorded"]), fields["vocab"])
        config = config_of(case, out / f"{case.name}_run", parallel=job["parallel"])
        torch.save(observe(config), out / f"{case.name}_{rank}.pt")
        check_checkpoint(config, out / f"{case.name}_checkpoints")
        assert train(config) == 0
        assert train(sampling_config(case, out / f"{case.name}_sampled", parallel=job["parallel"])) == 0


if __name__ == "__main__":
    run(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
