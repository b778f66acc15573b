"""Run folders with the curves that the paper tells of, written without any training."""

import json

import numpy as np
import yaml

SHAPES = {
    # Held-out accuracy as (step, value); of every other metric its start and end.
    "dies": {
        "accuracy": [(0, 0.27), (10, 0.41), (20, 0.17), (30, 0.02), (40, 0.0), (100, 0.0)],
        "proxy": (-5.6, -0.05),
        "entropy": (0.77, 0.01),
        "length": (7.4, 3.0),
        "alike": (0.1, 1.0),
        "ratio": (0.32, 1.0),
        "precision": (0.9, 0.0),
    },
    "rises": {
        "accuracy": [(0, 0.36), (20, 0.64), (40, 0.85), (60, 0.97), (100, 0.97)],
        "proxy": (-5.2, -0.5),
        "entropy": (0.64, 0.05),
        "length": (7.5, 9.0),
        "alike": (0.1, 0.1),
        "ratio": (0.38, 0.97),
        "precision": (0.9, 1.0),
    },
    "truth": {
        "accuracy": [(0, 0.25), (10, 0.63), (20, 0.85), (40, 0.94), (100, 0.97)],
        "proxy": (0.27, 0.96),
        "entropy": (0.77, 0.17),
        "length": (7.3, 9.3),
        "alike": (0.1, 0.1),
        "ratio": (0.3, 0.96),
        "precision": (0.7, 1.0),
    },
}
BASES = {
    "weak": {"greedy": 0.99, "maj@16": 0.69, "avg@16": 0.27},
    "strong": {"greedy": 1.0, "maj@16": 0.98, "avg@16": 0.36},
}


def make_run(
    folder,
    shape="dies",
    *,
    name=None,
    base="weak",
    reward="trajectory_entropy",
    seed=0,
    steps=100,
    every=5,
    sets=("held_out",),
    problems=64,
    lr=2.5e-4,
    state="done",
    base_greedy=None,
):
    """Write a run folder of one of SHAPES with noise from `seed`, and return its path."""
    form, rng = SHAPES[shape], np.random.default_rng(seed)
    folder.mkdir(parents=True)
    supervised = reward == "ground_truth"
    config = {
        "run": {"name": name or folder.name, "dir": str(folder), "steps": steps, "seed": seed},
        "model": {"path": f"bases/chain_sum/0123abcd/{base}"},
        "eval": {"every": every, "sets": {each: {"task": "chain_sum", "samples": 4} for each in sets}},
        "reward": {"terms": {"main": {"name": reward} | ({} if supervised else {"aggregation": "sum"})}},
        "optim": {"lr": lr},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    at, values = zip(*form["accuracy"], strict=True)
    lines = []
    for step in range(steps + 1):
        row = {"step": step}
        if step:
            share = 1 - np.exp(-step / 20)
            mix = lambda key: form[key][0] + (form[key][1] - form[key][0]) * share  # noqa: E731, B023
            row |= {
                "reward/proxy": mix("proxy") + rng.normal(0, 0.03),
                "policy/sampled_entropy": max(0.0, mix("entropy") + rng.normal(0, 0.01)),
                "response/length": mix("length") + rng.normal(0, 0.1),
                "answers/across_prompts": mix("alike") + rng.normal(0, 0.005),
                "response/no_answer": 0.02,
                "response/truncated": 0.0,
                "vote/majority_ratio": float(np.clip(mix("ratio") + rng.normal(0, 0.03), 0, 1)),
                "audit/vote/precision": float(np.clip(mix("precision") + rng.normal(0, 0.05), 0, 1)),
                "audit/vote/reward_accuracy": float(np.clip(mix("precision") + rng.normal(0, 0.02), 0, 1)),
                "time/step": 0.3,
            }
        if step % every == 0:
            for each in sets:
                accuracy = float(np.interp(step, at, values))
                correct = rng.binomial(4, accuracy, size=problems)
                row[f"eval/{each}/avg@4"] = float(correct.mean() / 4)
                row[f"eval/{each}/avg@4_se"] = float(correct.std() / 4 / np.sqrt(problems))
                with _evals(folder, each).open("a") as file:
                    file.write(json.dumps({"step": step, "correct": correct.tolist(), "n": 4}) + "\n")
                if step == 0:
                    scores = BASES[base] | ({} if base_greedy is None else {"greedy": base_greedy})
                    row |= {f"eval/{each}/base/{key}": value for key, value in scores.items()}
            _samples(folder, step, float(np.interp(step, at, values)), rng)
        lines.append(json.dumps(row))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "status.json").write_text(json.dumps({"state": state, "step": steps, "exit_code": 0, "reason": ""}))
    uses = {"audit": 100 * 256, "evaluation:held_out": 21 * 256} | (
        {"reward:ground_truth": 25600} if supervised else {}
    )
    (folder / "labels.json").write_text(json.dumps({"supervised": supervised, "uses": uses}))
    if state == "done":
        (folder / "DONE").touch()
    return folder


def _evals(folder, eval_set):
    (folder / "evals").mkdir(exist_ok=True)
    return folder / "evals" / f"{eval_set}.jsonl"


def _samples(folder, step, accuracy, rng):
    (folder / "samples").mkdir(exist_ok=True)
    rows = []
    for prompt in ("123450=", "990017="):
        right = bool(rng.random() < accuracy)
        answer = str(sum(map(int, prompt[:-1])) % 10) if right else "?"
        response = f"c13605#{answer}" if right else "#?"
        rows.append({"prompt": prompt, "response": response, "answer": answer, "reward": -0.5, "correct": right})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "samples" / f"step_{step:06d}.jsonl").write_text(text)
