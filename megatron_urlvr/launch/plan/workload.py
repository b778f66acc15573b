"""What one step asks for: tokens, micro-batches and passes, as the trainer will count them."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from ...config.root import Config
from ...types import STATISTICS
from .hardware import Assumptions


@dataclass(frozen=True)
class Workload:
    """One step of a run. Lengths are means, except where they are said to be the longest."""

    votes: int
    """Responses sampled a step."""
    trained: int
    """Responses trained on a step."""
    prompt: float
    response: float
    longest_response: int
    longest_row: int
    """Tokens of the longest prompt and response together."""
    scoring: tuple[str, ...]
    """Forward passes before the update, by what they are for, over the votes."""
    rescoring: tuple[str, ...]
    """The same over the trained responses."""
    updates: int
    """Optimizer steps."""

    @property
    def row(self) -> float:
        """Mean tokens of a prompt and its response; the last is never an input."""
        return self.prompt + self.response - 1


def workload_of(config: Config, assumptions: Assumptions) -> Workload:
    """The work of one training step under `config`."""
    from ...loop.off_policy import scored_by_trainer, wants_own
    from ...rewards import build_terms

    rollout, kl = config.rollout, config.algorithm.kl
    terms = build_terms(config.reward, advantage=config.algorithm.advantage, seed=config.run.seed)
    updates = 0 if config.run.rollout_only else config.updates_per_step
    wanted = terms.needs & STATISTICS if config.reward.statistics == "trainer" else frozenset[str]()
    own = updates > 0 and wants_own(config)
    if at_once := bool(own and wanted and scored_by_trainer(config)):
        wanted |= {"logp"}
    rescoring = []
    if kl.coef > 0 and updates:
        rescoring.append(f"log-probs of the reference ({kl.reference})")
    if own and not at_once:
        rescoring.append("log-probs before the first update")
    return Workload(
        votes=rollout.sampled * rollout.n_votes,
        trained=rollout.prompts * rollout.trained * (config.algorithm.epochs if updates else 0),
        prompt=assumptions.mean_prompt * config.data.max_prompt_tokens,
        response=assumptions.mean_response * rollout.max_new_tokens,
        longest_response=rollout.max_new_tokens,
        longest_row=config.data.max_prompt_tokens + rollout.max_new_tokens - 1,
        scoring=(", ".join(sorted(wanted)),) if wanted else (),
        rescoring=tuple(rescoring),
        updates=updates,
    )


def microbatches(rows: float, row: float, budget: int) -> int:
    """Micro-batches of `rows` rows of `row` tokens each, packed whole into `budget` tokens."""
    return ceil(ceil(rows) / max(1, int(budget // row)))
