"""`urlvr samples`: what the policy answered at a step, from recorded rollouts or else from the probes."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_urlvr.analysis.runs import load_run
from megatron_urlvr.config.errors import did_you_mean
from megatron_urlvr.exit_codes import UnusableInput
from megatron_urlvr.run.folder import RunDir
from megatron_urlvr.types import Group

SORTS = ("index", "reward", "length", "correct")


@dataclass(frozen=True)
class Shown:
    """One sample as it is printed; None where it was not recorded."""

    prompt_id: str
    prompt: str
    index: int
    response: str
    answer: str | None
    reward: float | None = None
    correct: bool | None = None
    length: int | None = None
    """Tokens."""
    cut: bool = False
    """Ended by max_new_tokens."""


def print_samples(run: Path, *, step: int | None, prompt: str | None, sort: str, limit: int) -> None:
    """Print the samples of `run`; see `samples_text`."""
    print(samples_text(run, step=step, prompt=prompt, sort=sort, limit=limit), end="")


def samples_text(run: Path, *, step: int | None, prompt: str | None, sort: str, limit: int) -> str:
    """The samples of `step` (None: the last that was kept) of prompts whose id or text contains `prompt`, sorted by one
    of SORTS (with a minus: the highest first). UnusableInput where that is not to be had."""
    _check_sort(sort)
    source, step, shown = _read(run, step)
    shown = [item for item in shown if prompt is None or prompt in item.prompt_id or prompt in item.prompt]
    if not shown:
        raise UnusableInput(f"--prompt {prompt!r}: no prompt of step {step} contains it.")
    key = sort.removeprefix("-")
    if key != "index" and all(getattr(item, key) is None for item in shown):
        raise UnusableInput(f"--sort {key}: the {source} of step {step} do not say it; sort by another key.")
    ordered = _sorted(shown, key, descending=sort.startswith("-"))
    head = f"step {step}, {source}: {min(limit, len(shown))} of {len(shown)} samples\n"
    return head + "".join(_block(item) for item in ordered[:limit])


def _check_sort(sort: str) -> None:
    if sort.removeprefix("-") not in SORTS:
        hint = did_you_mean(sort.removeprefix("-"), SORTS)
        raise UnusableInput(f"--sort {sort}: must be one of {', '.join(SORTS)}, with a minus for descending.{hint}")


def _sorted(shown: Sequence[Shown], key: str, *, descending: bool) -> list[Shown]:
    def rank(item: Shown) -> tuple[float, str, int]:
        value = getattr(item, key) if key != "index" else 0
        value = math.inf if value is None else -value if descending else value  # what is unknown comes last
        return (value, item.prompt_id, -item.index if key == "index" and descending else item.index)

    return sorted(shown, key=rank)


def _read(run: Path, step: int | None) -> tuple[str, int, list[Shown]]:
    """(`rollouts` or `probes`, the step, its samples)."""
    folder = RunDir(run)
    if not folder.config.is_file():
        raise UnusableInput(f"{run} is no run folder: it has no {folder.config.name}.")
    recorded, probed = _steps(folder.rollouts(0).parent), _steps(folder.samples(0).parent)
    kept = sorted({*recorded, *probed})
    if not kept:
        raise UnusableInput(
            f"{run} has no samples: a run keeps probes at evaluations (eval.every, monitor.probes) "
            "and all rollouts with rollout.record=true."
        )
    step = kept[-1] if step is None else step
    if step in recorded:
        return "rollouts", step, _rollouts(folder, step)
    if step in probed:
        return "probes", step, _probes(run, step)
    near = min(kept, key=lambda other: abs(other - step))
    raise UnusableInput(f"--step {step}: nothing was kept at this step of {run}. The nearest is {near}.")


def _steps(folder: Path) -> set[int]:
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return {int(match[1]) for name in names if (match := re.fullmatch(r"step_(\d+)\.jsonl(?:\.zst)?", name))}


def _probes(run: Path, step: int) -> list[Shown]:
    counts: dict[str, int] = {}
    out = []
    for row in load_run(run).samples(step):
        prompt = str(row["prompt"])
        index = counts[prompt] = counts.get(prompt, -1) + 1
        out.append(
            Shown(prompt, prompt, index, row["response"], row.get("answer"), row.get("reward"), row.get("correct"))
        )
    return out


def _rollouts(folder: RunDir, step: int) -> list[Shown]:
    from megatron_urlvr.rollout.records import read_groups

    groups = read_groups(folder.rollouts(step))
    rewards = _rewards(folder, groups)
    return [
        Shown(
            prompt_id=group.prompt.id,
            prompt=group.prompt.text,
            index=sample.index,
            response=sample.text,
            answer=sample.answer,
            reward=reward[sample.index] if reward is not None else None,
            length=sample.length,
            cut=sample.finish == "length",
        )
        for group, reward in zip(groups, rewards, strict=True)
        for sample in group.samples
    ]


def _rewards(folder: RunDir, groups: Sequence[Group]) -> Sequence[list[float] | None]:
    """The proxy reward of recorded groups, computed again from what was recorded with them; None where a signal is
    missing (labels never are recorded)."""
    from megatron_urlvr.config.loader import load_config
    from megatron_urlvr.rewards import RewardError, build_terms

    config = load_config(folder.config)
    terms = build_terms(config.reward, advantage=config.algorithm.advantage, seed=config.run.seed)
    try:
        return [result.proxy.tolist() for result in terms.score_groups(groups)]
    except RewardError:
        return [None] * len(groups)


def _block(item: Shown) -> str:
    facts = [f"{item.prompt_id} #{item.index}"]
    if item.reward is not None:
        facts.append(f"reward {item.reward:.4g}")
    if item.correct is not None:
        facts.append("right" if item.correct else "wrong")
    facts.append(f"answer {item.answer}" if item.answer is not None else "no answer")
    if item.length is not None:
        facts.append(f"{item.length} tokens" + (", cut off" if item.cut else ""))
    text = textwrap.indent(item.prompt, "  ? ", lambda _: True) + "\n"
    text += textwrap.indent(item.response, "  > ", lambda _: True) if item.response else "  >"
    return "\n" + " | ".join(facts) + "\n" + text.rstrip("\n") + "\n"
