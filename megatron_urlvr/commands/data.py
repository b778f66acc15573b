"""`urlvr data select`: the prompts on which a policy's votes are right, wrong or split, as a file to train on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from megatron_urlvr.analysis.estimators import NO_ANSWER, maj_at_n
from megatron_urlvr.config.errors import did_you_mean
from megatron_urlvr.config.root import Config
from megatron_urlvr.distributed.exchange import derive_seed, gather_from_leaders, hand_over, in_order, my_share
from megatron_urlvr.distributed.layout import joined, world_size_from_environment
from megatron_urlvr.exit_codes import ExitCode, UnusableInput
from megatron_urlvr.loop.assembly import Parts, build, preflight
from megatron_urlvr.run.folder import write_text
from megatron_urlvr.types import Prompt, Sampling

from .evaluate import find_checkpoint, load_step
from .outputs import make_parent, writing

CHUNK = 256
"""Prompts sampled at once."""
RULES: Mapping[str, tuple[str, Callable[[float, float], bool]]] = {
    "majority_wrong": ("the majority's answer is wrong", lambda avg, maj: maj < 0.5),
    "majority_right": ("the majority's answer is right", lambda avg, maj: maj >= 0.5),
    "all_wrong": ("no sample is right", lambda avg, maj: avg == 0),
    "mixed": ("some samples are right and some wrong", lambda avg, maj: 0 < avg < 1),
}
"""What to keep, by name: in words, and from the shares of right samples and of right (tied) majorities."""


def select(config: Config, *, keep: str, votes: int, out: Path, checkpoint: str | None = None) -> int:
    """Sample `votes` responses to every prompt of `data.train` and write those that `keep` keeps to `out` (JSON lines,
    `prompt`, `answer`, `id`, and what was found). Returns the exit code. UnusableInput for an unknown rule, prompts
    without labels, or when nothing is kept."""
    if keep not in RULES:
        raise UnusableInput(f"--keep {keep}: must be one of {', '.join(RULES)}.{did_you_mean(keep, RULES)}")
    make_parent(out, f"--out {out}")
    torch.set_num_threads(config.run.threads)
    path = None if checkpoint is None else find_checkpoint(config, checkpoint)
    preflight(config, world_size=world_size_from_environment())
    with (
        joined(config.parallel, device=config.run.device, seed=config.run.seed, run_dir=config.run.dir) as layout,
        closing(build(config, layout)) as parts,
    ):
        hand_over(parts.policy, parts.engine, layout, version=0 if path is None else load_step(parts, path))
        rows = _sampled(config, parts, votes)
        labelled = [row for row in rows if row is not None]
        if not labelled:
            raise UnusableInput("data.train has no labels, so that nobody can say which votes are right: give some.")
        kept = [row for row in labelled if RULES[keep][1](row["avg"], row["maj"])]
        if layout.is_main:
            _write(out, kept, len(labelled), len(rows) - len(labelled), RULES[keep][0])
    return int(ExitCode.DONE)


def _sampled(config: Config, parts: Parts, votes: int) -> list[dict[str, Any] | None]:
    """What was found on each prompt, in the set's order; None where it has no label."""
    mine = my_share(parts.train.prompts, parts.layout)
    rollout = config.rollout
    seed = derive_seed(config.run.seed, "select")
    sampling = Sampling(votes, rollout.max_new_tokens, rollout.temperature, seed=seed)
    rows: list[dict[str, Any] | None] = []
    for first in range(0, len(mine), CHUNK):
        for group in parts.generate(mine[first : first + CHUNK], sampling):
            right = parts.correctness(group, use="select")
            if right is None:
                rows.append(None)
                continue
            classes = [[NO_ANSWER if cls is None else cls for cls in group.classes]]
            share, majority = float(right.double().mean()), float(maj_at_n(classes, [right.tolist()])[0])
            rows.append({**_record(parts, group.prompt), "avg": share, "maj": majority, "votes": votes})
    return in_order(gather_from_leaders(rows, parts.layout))


def _record(parts: Parts, prompt: Prompt) -> dict[str, Any]:
    """A prompt as a row of a data file: the bare question where there was a template around it."""
    return {
        "id": prompt.id.partition("/")[2],
        "prompt": prompt.fields.get("question", prompt.text),
        "answer": parts.labels.get(prompt.id, use="select"),
    }


def _write(out: Path, kept: list[dict[str, Any]], labelled: int, without: int, rule: str) -> None:
    if not kept:
        raise UnusableInput(f"none of {labelled} prompts is left ({rule}), so that {out} was not written.")
    with writing(f"--out {out}"):
        write_text(out, "".join(json.dumps(row) + "\n" for row in kept))
    left_out = f"; {without} without a label were passed over" if without else ""
    print(f"{len(kept)} of {labelled} prompts kept: {rule}{left_out}")
    print(f"written to {out}: data.train={{path: {out}, id_field: id}} trains on them, with the source's own grading")
