"""What one step asks for: tokens, micro-batches and passes, as the trainer will count them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from ...config.root import Config
from ...types import STATISTICS
from .hardware import Assumptions

WEIGHTS = {"reference": "starting weights", "ema": "moving average"}


@dataclass(frozen=True)
class Rows:
    """Equal prompts and responses that go through the policy; lengths are means."""

    count: float
    prompt: float
    response: float

    @property
    def length(self) -> float:
        """Tokens of a row; the last of a response is never an input."""
        return self.prompt + self.response - 1


@dataclass(frozen=True)
class Lessons:
    """What a provider has the policy trained on in a step."""

    rows: Rows
    longest_row: int


@dataclass(frozen=True)
class Workload:
    """One step of a run. Lengths are means, except where they are said to be the longest."""

    votes: int
    """Responses sampled a step."""
    kept: int
    """Responses trained on a step; their log-probs may be wanted before."""
    epochs: int
    """How often they are trained on; 0 without an update."""
    prompt: float
    response: float
    longest_response: int
    longest_row: int
    """Tokens of the longest row that the trainer gets."""
    scoring: tuple[str, ...]
    """Forward passes before the update, by what they are for, over the votes."""
    rescoring: tuple[str, ...]
    """The same over the trained responses and lessons."""
    swaps: int
    """Passes under the weights of the reference or the moving average."""
    updates: int
    """Optimizer steps."""
    lessons: tuple[Rows, ...] = ()
    """What a step trains on beside its responses: verdicts of co-trained judges."""

    @property
    def trained(self) -> int:
        """Responses trained on a step, once for each epoch."""
        return self.kept * self.epochs

    @property
    def sampled_rows(self) -> Rows:
        """All responses of a step."""
        return Rows(self.votes, self.prompt, self.response)

    @property
    def trained_rows(self) -> tuple[Rows, ...]:
        """What one epoch trains on."""
        return (Rows(self.kept, self.prompt, self.response), *self.lessons)


def workload_of(config: Config, assumptions: Assumptions, lessons: Sequence[Lessons] = ()) -> Workload:
    """The work of one training step under `config`; `lessons` are those of its providers."""
    from ...loop.off_policy import scored_by_trainer, wants_own
    from ...rewards import build_terms

    rollout, kl = config.rollout, config.algorithm.kl
    terms = build_terms(config.reward, advantage=config.algorithm.advantage, seed=config.run.seed)
    updates = 0 if config.run.rollout_only else config.updates_per_step
    wanted = terms.needs & STATISTICS if config.reward.statistics == "trainer" else frozenset[str]()
    if config.algorithm.entropy_scaling:
        wanted |= {"entropy"}
    own = updates > 0 and wants_own(config)
    judge = config.reward.judge
    swaps = int(bool(wanted) and judge != "policy")
    if at_once := bool(own and wanted and scored_by_trainer(config)):
        wanted |= {"logp"}
    whose = "" if judge == "policy" else f" of the {WEIGHTS[judge]}"
    rescoring = []
    if kl.coef > 0 and updates:
        rescoring.append(f"log-probs of the reference ({kl.reference})")
        swaps += 1
    if own and not at_once:
        rescoring.append("log-probs before the first update")
    taught = lessons if updates else ()
    longest_row = config.data.max_prompt_tokens + rollout.max_new_tokens - 1
    return Workload(
        votes=rollout.sampled * rollout.n_votes,
        kept=rollout.prompts * rollout.trained,
        epochs=config.algorithm.epochs if updates else 0,
        prompt=assumptions.mean_prompt * config.data.max_prompt_tokens,
        response=assumptions.mean_response * rollout.max_new_tokens,
        longest_response=rollout.max_new_tokens,
        longest_row=max([longest_row, *(each.longest_row for each in taught)]),
        scoring=(", ".join(sorted(wanted)) + whose,) if wanted else (),
        rescoring=tuple(rescoring),
        swaps=swaps,
        updates=updates,
        lessons=tuple(each.rows for each in taught),
    )


def microbatches(rows: float, row: float, budget: int) -> int:
    """Micro-batches of `rows` rows of `row` tokens each, packed whole into `budget` tokens."""
    return ceil(ceil(rows) / max(1, int(budget // row)))
