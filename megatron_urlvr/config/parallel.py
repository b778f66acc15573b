"""`parallel`: how the policy is laid out over processes."""

from typing import Annotated, Literal

from pydantic import Field

from .base import Section, rule


class ParallelSection(Section):
    dp: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Data-parallel replicas; `auto`: world size / (tp x pp)."""
    tp: int = Field(default=1, ge=1)
    """Tensor-parallel size."""
    pp: int = Field(default=1, ge=1)
    """Pipeline-parallel size."""
    sequence_parallel: bool = False
    """Shard activations between tensor-parallel regions along the sequence."""
    distributed_optimizer: Literal["auto"] | bool = "auto"
    """Shard optimizer state over data-parallel ranks; `auto`: when there are at least two."""
    max_tokens_per_microbatch: int = Field(default=8192, ge=1)
    """Token budget of one micro-batch; one response longer than this makes a micro-batch of its own."""
    share_prefix: Literal["auto"] | bool = "auto"
    """Compute a prompt's rows once for all its responses in a micro-batch. `auto`: where attention allows it."""

    @rule("tp", "sequence_parallel")
    def _sequence_parallel(self) -> str | None:
        if self.sequence_parallel and self.tp == 1:
            return "sequence_parallel = true needs tp above 1: it shards between tensor-parallel regions"
        return None
