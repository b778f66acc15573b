"""Stands in for `urlvr` where a study's scheduling is tested: takes the same arguments, leaves the same files, trains
nothing, and imports nothing heavy. What a command resolves to, the test has left in $FAKE_CLI/resolved.json.

Files in $FAKE_CLI choose what happens: `<run>.fails` ends with an error, `<run>.waits` waits for SIGTERM,
`<snapshot>.missing` is not made. Every call is noted in $FAKE_CLI/calls."""

import json
import os
import signal
import sys
import time
from pathlib import Path


def base_dir(config):
    """Where the bases of a pretraining config lie."""
    return Path(config.run.dir) / f"{config.run.name}-{config.run.seed}"


def write_resolved(plan, to_yaml):
    """Leave what every command of `plan` resolves to, for the processes to come."""
    resolved = {
        "pretrain": {
            json.dumps(base.arguments): {"folder": str(base.folder), "snapshots": list(base.config.snapshots)}
            for base in plan.bases
        },
        "train": {
            json.dumps(run.arguments): {
                "name": run.config.run.name,
                "dir": run.config.run.dir,
                "steps": run.config.run.steps,
                "model": run.config.model.path,
                "yaml": to_yaml(run.config),
            }
            for run in plan.runs
        },
    }
    (_home() / "resolved.json").write_text(json.dumps(resolved))


def pretrain(folder, snapshots):
    _note(f"pretrain {folder}")
    for snapshot in snapshots:
        if not _chosen(snapshot, "missing"):
            (Path(folder) / snapshot).mkdir(parents=True, exist_ok=True)
    print("avg@16 0.30, maj@16 0.70")
    return 0


def train(name, dir, steps, model, yaml):
    _note(f"train {name} on {model} with {os.environ['OMP_NUM_THREADS']} thread")
    folder = Path(dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml)
    if not Path(model).is_dir():
        print(f"model.path = {model} is not there", file=sys.stderr)
        return 2
    if _chosen(name, "waits"):
        signal.signal(signal.SIGTERM, lambda *_: _leave(folder))
        print("waiting", flush=True)
        while True:
            time.sleep(0.05)
    if _chosen(name, "fails"):
        print("the loss was NaN", file=sys.stderr)
        _status(folder, "failed", 1)
        return 4
    rows = [{"step": k, "reward/proxy": k / 10, "eval/held_out/avg@4": 0.2 + k / 20} for k in range(steps + 1)]
    rows[0] |= {"eval/held_out/base/greedy": 0.9, "eval/held_out/base/maj@16": 0.7}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "DONE").touch()
    _status(folder, "done", steps)
    return 0


def _leave(folder):
    _status(folder, "preempted", 1)
    os._exit(75)


def _status(folder, state, step):
    (folder / "status.json").write_text(json.dumps({"state": state, "step": step}))


def _home():
    return Path(os.environ["FAKE_CLI"])


def _chosen(name, behaviour):
    return (_home() / f"{name}.{behaviour}").exists()


def _note(text):
    with (_home() / "calls").open("a") as file:
        file.write(text + "\n")


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    resolved = json.loads((_home() / "resolved.json").read_text())[command][json.dumps(arguments)]
    sys.exit({"pretrain": pretrain, "train": train}[command](**resolved))
