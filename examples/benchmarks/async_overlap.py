"""Seconds per step with and without generating ahead, in one run, and the age of every token that was trained on.

    python examples/benchmarks/async_overlap.py [--steps 20]

Three runs of the same small policy: `rollout.max_staleness` 0, and 1 with each `servers.pause`. The server is the fake
of the tests: its tokens are random and take the time that `--seconds-per-token` says, whatever this machine does
meanwhile, as those of a server on other hardware do; it has as many places as one batch has responses. So what is
measured is the overlap, not the speed of generation; the policy, the updates of the weights and the ledger are real.
From the synchronous run come G, the seconds a step waits for its responses, and T, those of the rest. One after the
other they take G + T; side by side max(G, T), and less where the next batch's requests take the places that short
responses leave while the longest of this one is waited for.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from fake_models import DiceModel  # noqa: E402
from fake_sglang import FakeServer  # noqa: E402

from megatron_urlvr.config.loader import load_config  # noqa: E402
from megatron_urlvr.config.pretrain import PretrainConfig  # noqa: E402
from megatron_urlvr.pretrain import main as pretrain  # noqa: E402
from megatron_urlvr.rollout.records import group_from_record, read_records  # noqa: E402
from megatron_urlvr.rollout.replay import rollout_file  # noqa: E402
from megatron_urlvr.train import main as train  # noqa: E402

TASK: dict[str, Any] = {"task": "chain_sum", "settings": {"digits": 3}}
BASE: dict[str, Any] = {
    "run": {"name": "overlap", "seed": 0, "steps": 10, "batch": 16},
    "data": {**TASK, "max_new_tokens": 24, "held_out": 8},
    "model": {"layers": 4, "hidden": 128, "ffn": 256, "heads": 4, "kv_heads": 2},
    "optim": {"lr": 1.0e-3},
    "snapshots": {"base": {"step": 10}},
}
WARM_UP = 3
"""Steps that are not counted."""


def config_file(folder: Path, name: str, tree: dict[str, Any]) -> Path:
    """JSON is YAML."""
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(tree))
    return path


def run(folder: Path, url: str, steps: int, staleness: int, pause: str) -> tuple[list[dict[str, float]], int]:
    """(Metrics of the counted steps, the age of the oldest token that was trained on)."""
    name = f"{staleness}_{pause}"
    tree: dict[str, Any] = {
        "run": {"name": name, "dir": str(folder / name), "seed": 0, "steps": steps},
        "model": {"path": str(folder / "base")},
        "data": {"max_prompt_tokens": 8, "train": {**TASK, "size": 512}},
        "eval": {"every": 0},
        "rollout": {
            "engine": "sglang",
            "prompts": 16,
            "n_votes": 8,
            "max_new_tokens": 24,
            "max_staleness": staleness,
            "record": True,
        },
        "reward": {"terms": {"main": {"name": "trajectory_entropy", "aggregation": "sum"}}},
        "algorithm": {"correction": {"old_logp": "rollout", "alarm": None}},
        "optim": {"lr": 1.0e-4},
        "servers": {"pools": {"policy": {"urls": [url], "concurrency": 16 * 8}}, "transport": "disk", "pause": pause},
        "checkpoint": {"every": 0},
        "monitor": {"tensorboard": False},
    }
    assert train(load_config(config_file(folder, name, tree))) == 0
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    oldest = 0
    for step in range(1, steps + 1):  # step s trains the weights of version s - 1
        for record in read_records(rollout_file(folder / name, step)):
            oldest = max(oldest, *(step - 1 - sample.oldest for sample in group_from_record(record)))
    return [json.loads(line) for line in lines][1 + WARM_UP :], oldest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seconds-per-token", type=float, default=0.02)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pretrain(
            load_config(config_file(folder, "base", {**BASE, "run": {**BASE["run"], "dir": name}}), [], PretrainConfig)
        )
        vocab = json.loads((folder / "base" / "config.json").read_text())["vocab_size"]
        pace = options.seconds_per_token
        server = FakeServer(DiceModel(vocab), vocab_size=vocab, context=64, pace=lambda: pace)
        found = {}
        try:
            for staleness, pause in ((0, "retract"), (1, "retract"), (1, "in_place")):
                found[staleness, pause] = run(folder, server.url, options.steps, staleness, pause)
        finally:
            server.stop()
    report(found)


def report(found: dict[tuple[int, str], tuple[list[dict[str, float]], int]]) -> None:
    """Medians over the counted steps."""

    def median(rows: list[dict[str, float]], name: str) -> float:
        return statistics.median(row[name] for row in rows)

    rows, _ = found[0, "retract"]
    waits = median(rows, "time/generate")
    rest = statistics.median(row["time/step"] - row["time/generate"] for row in rows)
    print(f"\nG = {waits:.3f} s, T = {rest:.3f} s: max(G, T) = {max(waits, rest):.3f} s, G + T = {waits + rest:.3f} s")
    print(f"{'max_staleness':>14} {'pause':>9} {'s/step':>8} {'waiting':>8} {'oldest token':>13} {'overlap':>8}")
    for (staleness, pause), (rows, oldest) in found.items():
        step = median(rows, "time/step")
        overlap = (waits + rest - step) / min(waits, rest)  # 0: the sum, 1: the larger of the two
        waited = median(rows, "time/generate")
        print(f"{staleness:>14} {pause:>9} {step:>8.3f} {waited:>8.3f} {oldest:>13} {overlap:>8.2f}")


if __name__ == "__main__":
    main()
