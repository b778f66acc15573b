"""`rollout`: how responses are sampled."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field

from .base import Section, rule
from .named import NamedSection


class FilterSection(NamedSection):
    """Which groups are trained on: a filter's name, and its own options beside it."""

    name: str
    """`zero_variance`: not those whose samples all have one reward. `majority`: those whose winning answer's share lies
    within [low, high]. Or one from an entry point."""

    @classmethod
    def named(cls, name: str) -> Any:
        """The filter's class."""
        from megatron_urlvr.rollout.filters import get_filter

        return get_filter(name)


class RolloutSection(Section):
    engine: Literal["embedded", "sglang", "replay"] = "embedded"
    """`embedded`: a transformers model in this process; `sglang`: the servers of `servers`; `replay`: recorded
    rollouts of another run."""
    prompts: int = Field(ge=1)
    """Prompts of one step, over all data-parallel replicas."""
    n_votes: int = Field(ge=1)
    """Responses sampled for each prompt; all of them vote."""
    n_train: int | None = Field(default=None, ge=1)
    """Responses of each prompt that are trained on. None: all."""
    train_on: Literal["first", "random", "stratified"] = "first"
    """Which `n_train` of the votes: the first, any, or of every answer its share."""
    early_voting: bool = False
    """Give up the votes beyond `n_train` that are still being sampled once they cannot change the majority. Needs
    servers and the reward `majority_vote` alone."""
    filter: FilterSection | None = None
    """Dynamic sampling: of `oversample` times as many groups those are trained on that the filter keeps. None: all."""
    oversample: float = Field(default=1.0, ge=1)
    """Prompts sampled for each one that is trained on. Good groups beyond `prompts` are left out; where they are too
    few, groups that the filter dropped fill up."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature; statistics and rewards use the same. Truncated sampling is for evaluation alone."""
    max_new_tokens: int = Field(ge=1)
    """Longest response, in tokens."""
    batch: int = Field(default=4096, ge=1)
    """Most sequences decoded at once by the embedded engine."""
    max_staleness: int = Field(default=0, ge=0)
    """How many versions the weights that sampled a token may be older than those it trains. 0: the next batch is
    generated when this one is trained on; 1: meanwhile; k: up to k batches ahead. More than 0 needs servers."""
    replay_from: str | None = None
    """Run folder whose `rollouts/` the replay engine reads."""
    record: bool = False
    """Write every step's rollouts to `rollouts/`."""

    @rule("engine", "replay_from")
    def _replay(self) -> str | None:
        if self.engine == "replay" and not self.replay_from:
            return "engine: replay needs replay_from, the folder of the run to replay"
        if self.engine != "replay" and self.replay_from:
            return f"replay_from = {self.replay_from!r} is read by engine: replay alone, and engine is {self.engine}"
        return None

    @rule("engine", "max_staleness")
    def _ahead(self) -> str | None:
        if self.max_staleness and self.engine != "sglang":
            why = {
                "embedded": "the embedded engine generates in the trainer's own process, while nothing is trained",
                "replay": "recorded rollouts take no time",
            }[self.engine]
            return (
                f"max_staleness = {self.max_staleness} with engine: {self.engine}: {why}; set max_staleness=0, or"
                " engine=sglang"
            )
        return None

    @rule("n_train", "n_votes")
    def _trained_are_sampled(self) -> str | None:
        if self.n_train is not None and self.n_train > self.n_votes:
            return (
                f"n_train = {self.n_train} is more than n_votes = {self.n_votes}: train on at most all that are sampled"
            )
        return None

    @rule("filter", "oversample")
    def _choice_of_groups(self) -> str | None:
        if self.filter is None and self.oversample > 1:
            return (
                f"oversample = {self.oversample} without a filter: nothing says which groups to leave out; set filter"
            )
        if self.filter is not None and self.oversample == 1:
            return "filter with oversample = 1: there is nothing to choose from; set oversample above 1"
        return None

    @rule("early_voting", "engine", "train_on", "n_train", "n_votes", "filter")
    def _votes_to_spare(self) -> str | None:
        if not self.early_voting:
            return None
        if self.engine != "sglang":
            return f"early_voting with engine: {self.engine}, which samples all votes at once: set engine=sglang"
        if self.trained == self.n_votes:
            return (
                f"early_voting with n_train = n_votes = {self.n_votes}: there are no votes to spare; set n_train lower"
            )
        if self.train_on != "first":
            return (
                f"early_voting with train_on = {self.train_on!r} would train on responses that came early, which are "
                "the short ones; set train_on=first"
            )
        if self.filter is not None:
            return "early_voting with filter: votes that were given up cannot be judged; set one of the two"
        return None

    @rule("train_on", "n_train", "n_votes")
    def _choice_of_votes(self) -> str | None:
        if self.train_on != "first" and self.trained == self.n_votes:
            return (
                f"train_on = {self.train_on!r} with n_train = n_votes = {self.n_votes}: all votes are trained on; set "
                "n_train below n_votes, or train_on=first"
            )
        return None

    @property
    def sampled(self) -> int:
        """Prompts of one step that are sampled."""
        return math.ceil(self.prompts * self.oversample)

    @property
    def trained(self) -> int:
        """Responses of each prompt that are trained on."""
        return self.n_votes if self.n_train is None else self.n_train
