"""Evaluation on held-out sets: sampled and greedy accuracy, votes, pass@k, with errors from resampling problems."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .analysis.estimators import NO_ANSWER, mean_and_se, summarise
from .assembly import HeldOut, Parts, build
from .batching import score_groups
from .config.root import Config
from .data.grading.annotate import annotate
from .exchange import derive_seed, gather_from_leaders, my_share, share_groups
from .exit_codes import ExitCode, UnusableInput
from .layout import Layout, start
from .policy import checkpoint
from .rewards.base import LABEL
from .run_dir import write_json
from .run_files import RunFiles
from .types import Group, Prompt, Sampling

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
    sampled = _generate(parts, prompts, Sampling(votes, longest, spec.temperature, spec.top_p, seed))
    greedy: Sequence[Group | None] = [None] * len(prompts)
    if spec.greedy:
        greedy = _generate(parts, prompts, Sampling(1, longest, 0.0))
    rows = []
    for group, best in zip(sampled, greedy, strict=True):
        right = parts.correctness(group, use=f"evaluation:{name}")
        if right is None:
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
    return [row for part in gather_from_leaders(rows, parts.layout) for row in part]


def _generate(parts: Parts, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
    groups = None
    if parts.engine is not None:
        found = {group.prompt.id: group for group in parts.engine.generate(prompts, sampling)}
        groups = [found[prompt.id] for prompt in prompts]
    groups = share_groups(groups, parts.layout)
    annotate(groups, parts.grader_of)
    return groups


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
            if not rows:
                raise UnusableInput(f"eval.sets.{name} has no labels: accuracy cannot be measured on it")
            metrics |= {
                f"eval/{name}/{key}": v for key, v in summarise_rows(rows, held.spec, held.spec.samples).items()
            }
            if step == 0:
                base = summarise_rows(rows, held.spec, votes)
                lines = (f"avg@{votes}", f"maj@{votes}", "greedy")
                metrics |= {f"eval/{name}/base/{key}": base[key] for key in lines if key in base}
            right = [sum(row["right"][: held.spec.samples]) for row in rows]
            self.files.append_evaluation(name, {"step": step, "n": held.spec.samples, "correct": right})
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
        groups = _generate(self.parts, held.prompts.prompts[:count], sampling)
        right = [self.parts.correctness(group, use="probes") for group in groups]
        score_groups(self.config, self.parts, groups)
        if LABEL in self.parts.reward.needs:
            for group, truth in zip(groups, right, strict=True):
                group.signals["correct"] = torch.zeros(len(group)) if truth is None else truth.float()
        rewards = [result.total.tolist() for result in self.parts.reward.score_groups(groups)]
        rows = [
            {
                "prompt": group.prompt.text,
                "response": sample.text,
                "finish": sample.finish,
                "answer": sample.answer,
                "reward": rewards[g][k],
                "correct": None if right[g] is None else bool(right[g][k]),  # type: ignore[index]
            }
            for g, group in enumerate(groups)
            for k, sample in enumerate(group.samples)
        ]
        self.files.write_samples(step, rows)


def summarise_rows(rows: Sequence[dict[str, Any]], spec: Any, votes: int) -> dict[str, float]:
    """Metrics of the first `votes` samples of each problem, and of the greedy response."""
    right = [row["right"][:votes] for row in rows]
    classes = [[NO_ANSWER if c is None else c for c in row["classes"][:votes]] for row in rows]
    metrics = summarise(right, classes, pass_k=[k for k in spec.pass_k if k < votes])
    if spec.greedy:
        metrics["greedy"], metrics["greedy_se"] = mean_and_se([row["greedy"] for row in rows], seed=0)
    return metrics


def main(config: Config, checkpoint_path: str | None, sets: list[str] | None) -> int:
    """`urlvr eval`: the base of `config`, or a checkpoint of its run, on its held-out sets. Returns the exit code."""
    torch.set_num_threads(config.run.threads)
    if unknown := sorted(set(sets or []) - set(config.eval.sets)):
        raise UnusableInput(f"no evaluation set {unknown[0]!r}; eval.sets has {', '.join(config.eval.sets) or 'none'}")
    if not config.eval.sets:
        raise UnusableInput("eval.sets is empty: there is nothing to evaluate on")
    layout = start(config.parallel, device=config.run.device, seed=config.run.seed)
    parts = build(config, layout)
    step = 0
    if checkpoint_path is not None:
        step = int(checkpoint.load(parts.policy, Path(checkpoint_path))["step"])
    if parts.engine is not None:
        parts.engine.begin_update(step)
        parts.engine.update(parts.policy.export())
        parts.engine.end_update()
    else:
        for _ in parts.policy.export():
            pass
    result: dict[str, Any] = {"model": config.model.path, "checkpoint": checkpoint_path, "step": step, "sets": {}}
    for name in sets or config.eval.sets:
        held = parts.held_out[name]
        seed = derive_seed(config.run.seed, "eval", name)
        rows = evaluate_set(
            parts, name, held, votes=held.spec.samples, longest=config.rollout.max_new_tokens, seed=seed
        )
        result["sets"][name] = summarise_rows(rows, held.spec, held.spec.samples)
    parts.close()
    _report(config, layout, result)
    return int(ExitCode.DONE)


def _report(config: Config, layout: Layout, result: dict[str, Any]) -> None:
    if not layout.is_main:
        return
    out = Path(config.run.dir) / "evals" / f"eval_step_{result['step']:06d}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, result)
    for name, metrics in result["sets"].items():
        for key, value in metrics.items():
            print(f"{name:>16}  {key:<28} {value:.4f}")
    print(f"written to {out} ({json.dumps(result['checkpoint'] or result['model'])})")
