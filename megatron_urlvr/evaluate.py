"""Evaluation on held-out sets: sampled and greedy accuracy, votes, pass@k, with errors from resampling problems."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from .analysis.estimators import NO_ANSWER, Floats, maj_at_n, mean_and_se, summarise
from .assembly import HeldOut, Parts, build, preflight
from .batching import reward_groups, score_groups
from .config.errors import did_you_mean
from .config.root import Config
from .exchange import derive_seed, gather_from_leaders, hand_over, in_order, my_share
from .exit_codes import ExitCode, UnusableInput
from .layout import joined, world_size_from_environment
from .policy.checkpoint import CheckpointError, list_checkpoints, load
from .run_dir import RunDir, write_json
from .run_files import RunFiles
from .types import Group, Sampling

PROBE_SAMPLES = 4
"""Samples of each probe prompt that are kept for the report."""


def evaluate_set(
    parts: Parts, name: str, held: HeldOut, *, votes: int, longest: int, seed: int
) -> list[dict[str, Any]]:
    """Per-problem results of one set, `votes` samples each, in the set's order, on every rank.

    Each is `{"id", "right": [votes bools], "classes": [votes], "greedy": bool or None}`; problems without a label are
    left out. The draws depend on `seed` alone: two policies, or two steps, meet the same ones.
    """
    spec = held.spec
    prompts = my_share(held.prompts.prompts, parts.layout)
    longest = spec.max_new_tokens or longest
    sampled = parts.generate(prompts, Sampling(votes, longest, spec.temperature, spec.top_p, seed))
    greedy: Sequence[Group | None] = [None] * len(prompts)
    if spec.greedy:
        greedy = parts.generate(prompts, Sampling(1, longest, 0.0))
    rows: list[dict[str, Any] | None] = []
    for group, best in zip(sampled, greedy, strict=True):
        right = parts.correctness(group, use=f"evaluation:{name}")
        if right is None:
            rows.append(None)
            continue
        best_right = None if best is None else parts.correctness(best, use=f"evaluation:{name}")
        rows.append(
            {
                "id": group.prompt.id,
                "right": right.tolist(),
                "classes": group.classes,
                "greedy": None if best_right is None else bool(best_right[0]),
            }
        )
    return [row for row in in_order(gather_from_leaders(rows, parts.layout)) if row is not None]


class Evaluator:
    """Evaluates every set when it is due, and keeps what the report needs."""

    def __init__(self, config: Config, parts: Parts, files: RunFiles) -> None:
        self.config, self.parts, self.files = config, parts, files

    def due(self, step: int) -> bool:
        """Every `eval.every` steps, at step 0 and at the end."""
        every = self.config.eval.every
        return every > 0 and bool(self.config.eval.sets) and (step % every == 0 or step == self.config.run.steps)

    def run(self, step: int) -> dict[str, float]:
        """`eval/<set>/...` metrics at `step`; at step 0 also the base's own lines. Empty when nothing is due."""
        if not self.due(step):
            return {}
        metrics: dict[str, float] = {}
        for name, held in self.parts.held_out.items():
            votes = max(held.spec.samples, held.spec.base_votes) if step == 0 else held.spec.samples
            rows = self._rows(name, held, votes)
            metrics |= {
                f"eval/{name}/{key}": v for key, v in summarise_rows(rows, held.spec, held.spec.samples).items()
            }
            if step == 0:
                base = summarise_rows(rows, held.spec, votes)
                lines = (f"avg@{votes}", f"maj@{votes}", "greedy")
                metrics |= {f"eval/{name}/base/{key}": base[key] for key in lines if key in base}
            right = [sum(row["right"][: held.spec.samples]) for row in rows]
            kept: dict[str, Any] = {"step": step, "n": held.spec.samples, "correct": right}
            if step == 0:  # what the base believes, to tell apart later where it was right and where it was wrong
                kept |= {"votes": votes, "majority_right": majority_right(rows).tolist()}
            self.files.append_evaluation(name, kept)
        self._keep_probes(step)
        return metrics

    def _rows(self, name: str, held: HeldOut, votes: int) -> list[dict[str, Any]]:
        seed = derive_seed(self.config.run.seed, "eval", name)
        return evaluate_set(self.parts, name, held, votes=votes, longest=self.config.rollout.max_new_tokens, seed=seed)

    def _keep_probes(self, step: int) -> None:
        """A few samples of the first held-out prompts, with rewards, for the report. Every replica draws the same."""
        count = self.config.monitor.probes
        if not count:
            return
        held = next(iter(self.parts.held_out.values()))
        longest = held.spec.max_new_tokens or self.config.rollout.max_new_tokens
        seed = derive_seed(self.config.run.seed, "probes")
        sampling = Sampling(PROBE_SAMPLES, longest, self.config.rollout.temperature, seed=seed)
        # A supervised reward can say nothing of a prompt without a label, one from a provider not of every prompt.
        known = [p for p in held.prompts.prompts if self.parts.can_reward(p)]
        groups = self.parts.generate(known[:count], sampling)
        score_groups(self.config, self.parts, groups)
        rewards = reward_groups(self.parts, groups, use="probes")
        right = [self.parts.correctness(group, use="probes") for group in groups]
        rows = [
            {
                "prompt": group.prompt.text,
                "response": sample.text,
                "finish": sample.finish,
                "answer": sample.answer,
                "reward": float(reward.total[k]),
                "correct": None if truth is None else bool(truth[k]),
            }
            for group, reward, truth in zip(groups, rewards, right, strict=True)
            for k, sample in enumerate(group.samples)
        ]
        self.files.write_samples(step, rows)


def majority_right(rows: Sequence[dict[str, Any]]) -> Floats:
    """Whether each problem's majority answer is right, `[P]`; of k tied ones each counts 1/k."""
    classes = [[NO_ANSWER if c is None else c for c in row["classes"]] for row in rows]
    return maj_at_n(classes, [row["right"] for row in rows])


def summarise_rows(rows: Sequence[dict[str, Any]], spec: Any, votes: int) -> dict[str, float]:
    """Metrics of the first `votes` samples of each problem, and of the greedy response."""
    right = [row["right"][:votes] for row in rows]
    classes = [[NO_ANSWER if c is None else c for c in row["classes"][:votes]] for row in rows]
    metrics = summarise(right, classes, pass_k=[k for k in spec.pass_k if k < votes])
    if spec.greedy:
        metrics["greedy"], metrics["greedy_se"] = mean_and_se([row["greedy"] for row in rows], seed=0)
    return metrics


def main(config: Config, checkpoint: str | None, sets: list[str] | None) -> int:
    """`urlvr eval`: the base of `config`, or a checkpoint of its run (a name such as `step_000050`, or a folder), on
    the held-out sets named, or all. Returns the exit code."""
    torch.set_num_threads(config.run.threads)
    if not config.eval.sets:
        raise UnusableInput("eval.sets is empty: there is nothing to evaluate on; name a set, such as held_out, there.")
    path = None if checkpoint is None else _find_checkpoint(config, checkpoint)
    if config.rollout.engine == "replay":  # which holds no responses to held-out prompts
        config.rollout = config.rollout.model_copy(update={"engine": "embedded", "replay_from": None})
    preflight(config, world_size=world_size_from_environment())
    with (
        joined(config.parallel, device=config.run.device, seed=config.run.seed, run_dir=config.run.dir) as layout,
        closing(build(config, layout)) as parts,
    ):
        step = 0 if path is None else _load(parts, path)
        hand_over(parts.policy.export(), parts.engine, layout, version=step)
        metrics = {}
        for name in sets or config.eval.sets:
            held, seed = parts.held_out[name], derive_seed(config.run.seed, "eval", name)
            longest = config.rollout.max_new_tokens
            rows = evaluate_set(parts, name, held, votes=held.spec.samples, longest=longest, seed=seed)
            metrics[name] = summarise_rows(rows, held.spec, held.spec.samples)
    if layout.is_main:
        _report(config, path, step, metrics)
    return int(ExitCode.DONE)


def _find_checkpoint(config: Config, given: str) -> Path:
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


def _load(parts: Parts, path: Path) -> int:
    """Restore the policy from `path`; returns its step. UnusableInput when the checkpoint cannot be used."""
    try:
        return int(load(parts.policy, path)["step"])
    except CheckpointError as error:
        raise UnusableInput(f"{error}.") from error


def _report(config: Config, checkpoint: Path | None, step: int, metrics: Mapping[str, Mapping[str, float]]) -> None:
    """Print the figures and keep them in the run's folder."""
    what = str(checkpoint or config.model.path)
    out = Path(config.run.dir) / "evals" / f"eval_{checkpoint.name if checkpoint else 'base'}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    finite = {name: {k: v if math.isfinite(v) else None for k, v in found.items()} for name, found in metrics.items()}
    write_json(out, {"policy": what, "step": step, "sets": finite})
    for name, found in metrics.items():
        for key, value in found.items():
            print(f"{name:>16}  {key:<28} {value:.4f}")
    print(f"{what}; written to {out}")
