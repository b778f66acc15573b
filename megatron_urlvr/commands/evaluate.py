"""`urlvr eval`: a policy on held-out sets, its problems one by one, and what rewards know of its right answers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from megatron_urlvr.analysis.alignment import alignment, problem_aurocs
from megatron_urlvr.analysis.estimators import avg_at_n
from megatron_urlvr.config.errors import did_you_mean
from megatron_urlvr.config.root import Config
from megatron_urlvr.distributed.exchange import derive_seed, hand_over
from megatron_urlvr.distributed.layout import joined, world_size_from_environment
from megatron_urlvr.evaluate import evaluate_set, majority_right, summarise_rows
from megatron_urlvr.exit_codes import ExitCode, UnusableInput
from megatron_urlvr.loop.assembly import Parts, build, preflight
from megatron_urlvr.policy.checkpoint import CheckpointError, list_checkpoints, load
from megatron_urlvr.run.folder import RunDir, write_json, write_text

from .outputs import make_folder
from .scoring import Scorer, scorable

Rows = Sequence[dict[str, Any]]


def main(config: Config, checkpoint: str | None, sets: list[str] | None, rewards: list[str] | None = None) -> int:
    """The base of `config`, or a checkpoint of its run (a name such as `step_000050`, or a folder), on the held-out
    sets named, or all; with `rewards` (names, labels of terms, or `all`) also how these go with correctness. Returns
    the exit code."""
    torch.set_num_threads(config.run.threads)
    if not config.eval.sets:
        raise UnusableInput("eval.sets is empty: there is nothing to evaluate on; name a set, such as held_out, there.")
    chosen = scorable(rewards or [], config.reward.terms, seed=config.run.seed)
    path = None if checkpoint is None else find_checkpoint(config, checkpoint)
    if config.rollout.engine == "replay":  # which holds no responses to held-out prompts
        config.rollout = config.rollout.model_copy(update={"engine": "embedded", "replay_from": None})
    preflight(config, world_size=world_size_from_environment())
    _results_folder(config)
    with (
        joined(config.parallel, device=config.run.device, seed=config.run.seed, run_dir=config.run.dir) as layout,
        closing(build(config, layout)) as parts,
    ):
        step = 0 if path is None else load_step(parts, path)
        hand_over(parts.policy, parts.engine, layout, version=step)
        temperature = config.reward.temperature
        at = None if temperature == "rollout" else temperature
        score = Scorer(parts, chosen, temperature=at) if chosen else None
        found: dict[str, tuple[dict[str, float], Rows]] = {}
        for name in sets or config.eval.sets:
            held, seed = parts.held_out[name], derive_seed(config.run.seed, "eval", name)
            longest = config.rollout.max_new_tokens
            votes = held.spec.samples
            rows = evaluate_set(parts, name, held, votes=votes, longest=longest, seed=seed, score=score)
            metrics = summarise_rows(rows, held.spec, votes)
            for label, reward in chosen.items():
                aligned = alignment(rows, label, calibrated=reward.value_range.is_unit)
                metrics |= {f"{label}/{key}": value for key, value in aligned.items()}
            found[name] = metrics, rows
    if layout.is_main:
        _report(config, path, step, found)
    return int(ExitCode.DONE)


def find_checkpoint(config: Config, given: str) -> Path:
    """The folder of a checkpoint of the run. UnusableInput when there is none."""
    folder = RunDir(config.run.dir).checkpoints
    for path in (folder / given, Path(given)):
        if path.is_dir():
            return path
    known = [path.name for _, path in list_checkpoints(folder)]
    raise UnusableInput(
        f"--checkpoint {given}: there is no such checkpoint.{did_you_mean(given, known)}"
        f" {folder} has {', '.join(known) or 'none'}."
    )


def load_step(parts: Parts, path: Path) -> int:
    """Restore the policy from `path`; returns its step. UnusableInput when the checkpoint cannot be used."""
    try:
        return int(load(parts.policy, path)["step"])
    except CheckpointError as error:
        raise UnusableInput(f"{error}.") from error


def _report(
    config: Config, checkpoint: Path | None, step: int, found: Mapping[str, tuple[Mapping[str, float], Rows]]
) -> None:
    """Print the figures and keep them in the run's folder, with a table of the problems of each set."""
    what, name = str(checkpoint or config.model.path), checkpoint.name if checkpoint else "base"
    folder = _results_folder(config)
    sets = {
        each: {k: v if math.isfinite(v) else None for k, v in metrics.items()} for each, (metrics, _) in found.items()
    }
    out = folder / f"eval_{name}.json"
    write_json(out, {"policy": what, "step": step, "sets": sets})
    for each, (metrics, rows) in found.items():
        table = folder / f"eval_{name}.{each}.problems.jsonl"
        write_text(table, "".join(json.dumps(row) + "\n" for row in problem_table(rows)))
        for key, value in metrics.items():
            print(f"{each:>16}  {key:<36} {value:.4f}")
        print(f"{each:>16}  problems, one by one: {table}")
    print(f"{what}; written to {out}")


def _results_folder(config: Config) -> Path:
    """Made where it is not there. UnusableInput when that is not possible."""
    return make_folder(Path(config.run.dir) / "evals", f"run.dir = {config.run.dir}")


def problem_table(rows: Rows) -> list[dict[str, Any]]:
    """A row a problem: samples `n`, right ones `correct`, `avg` and `maj` accuracy, `greedy`, the number of `answers`
    and the share of the largest (`majority`), and the AUROC of each reward, null where there is nothing to rank."""
    averages, majorities = avg_at_n([row["right"] for row in rows]).tolist(), majority_right(rows).tolist()
    aurocs = {label: problem_aurocs(rows, label) for label in rows[0].get("rewards", {})}
    out = []
    for k, row in enumerate(rows):
        voted = [cls for cls in row["classes"] if cls is not None]
        largest = max((voted.count(cls) for cls in set(voted)), default=0)
        out.append(
            {
                "id": row["id"],
                "n": len(row["right"]),
                "correct": sum(row["right"]),
                "avg": averages[k],
                "maj": majorities[k],
                "greedy": None if row["greedy"] is None else float(row["greedy"]),
                "answers": len(set(voted)),
                "majority": largest / len(row["classes"]),
                **({"auroc": {label: values[k] for label, values in aurocs.items()}} if aurocs else {}),
            }
        )
    return out
