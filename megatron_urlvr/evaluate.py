"""Evaluation on held-out sets: sampled and greedy accuracy, votes, pass@k, with errors from resampling problems."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .analysis.estimators import NO_ANSWER, Floats, maj_at_n, mean_and_se, summarise
from .config.root import Config
from .distributed.exchange import derive_seed, gather_from_leaders, in_order, my_share
from .loop.assembly import HeldOut, Parts
from .loop.batching import reward_groups, score_groups
from .run.files import RunFiles
from .types import Group, Sampling

Score = Callable[[Sequence[Group]], Sequence[dict[str, Any]]]
"""What rewards say of each group, to be kept beside its results. Collective within a replica."""
PROBE_SAMPLES = 4
"""Samples of each probe prompt that are kept for the report."""


def evaluate_set(
    parts: Parts, name: str, held: HeldOut, *, votes: int, longest: int, seed: int, score: Score | None = None
) -> list[dict[str, Any]]:
    """Per-problem results of one set, `votes` samples each, in the set's order, on every rank.

    Each is `{"id", "right": [votes bools], "classes": [votes], "greedy": bool or None}`; problems without a label are
    left out. With `score` also what it returns. With the
    embedded engine the draws depend on `seed` alone: policies, or two steps, meet the same ones.
    """
    spec = held.spec
    prompts = my_share(held.prompts.prompts, parts.layout)
    longest = spec.max_new_tokens or longest
    sampled = parts.generate(prompts, Sampling(votes, longest, spec.temperature, spec.top_p, seed))
    greedy: Sequence[Group | None] = [None] * len(prompts)
    if spec.greedy:
        greedy = parts.generate(prompts, Sampling(1, longest, 0.0))
    scored = [None] * len(sampled) if score is None else score(sampled)
    rows: list[dict[str, Any] | None] = []
    for group, best, scores in zip(sampled, greedy, scored, strict=True):
        right = parts.correctness(group, use=f"evaluation:{name}")
        if right is None:
            rows.append(None)
            continue
        best_right = None if best is None else parts.correctness(best, use=f"evaluation:{name}")
        row: dict[str, Any] = {
            "id": group.prompt.id,
            "right": right.tolist(),
            "classes": group.classes,
            "greedy": None if best_right is None else bool(best_right[0]),
        }
        rows.append(row if scores is None else {**row, **scores})
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
                "reward": float(reward.proxy[k]),
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
    pass_k, maj_k = [k for k in spec.pass_k if k < votes], [k for k in spec.maj_k if 2 * k <= votes]
    metrics = summarise(right, classes, pass_k=pass_k, maj_k=maj_k)
    if spec.greedy:
        metrics["greedy"], metrics["greedy_se"] = mean_and_se([row["greedy"] for row in rows], seed=0)
    return metrics
