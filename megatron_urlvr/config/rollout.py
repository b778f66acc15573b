"""`rollout`: how responses are sampled."""

from typing import Literal

from pydantic import Field

from .base import Section, rule


class RolloutSection(Section):
    engine: Literal["embedded", "sglang", "replay"] = "embedded"
    """`embedded`: a transformers model in this process; `sglang`: the servers of `servers`; `replay`: recorded
    rollouts of another run."""
    prompts: int = Field(ge=1)
    """Prompts of one step, over all data-parallel replicas."""
    n_votes: int = Field(ge=1)
    """Responses sampled for each prompt; all of them vote."""
    n_train: int | None = Field(default=None, ge=1)
    """Responses of each prompt that are trained on, the first ones. None: all."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature; statistics and rewards use the same. Truncated sampling is for evaluation alone."""
    max_new_tokens: int = Field(ge=1)
    """Longest response, in tokens."""
    batch: int = Field(default=4096, ge=1)
    """Most sequences decoded at once by the embedded engine."""
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

    @rule("n_train", "n_votes")
    def _trained_are_sampled(self) -> str | None:
        if self.n_train is not None and self.n_train > self.n_votes:
            return (
                f"n_train = {self.n_train} is more than n_votes = {self.n_votes}: train on at most all that are sampled"
            )
        return None

    @property
    def trained(self) -> int:
        """Responses of each prompt that are trained on."""
        return self.n_votes if self.n_train is None else self.n_train
