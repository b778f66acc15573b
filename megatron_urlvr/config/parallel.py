"""`parallel`: how the policy is laid out over processes."""

from typing import Annotated, Literal

from pydantic import Field

from .base import Section, rule


class ParallelSection(Section):
    dp: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Data-parallel replicas; `auto`: world size / (tp x pp x cp)."""
    tp: int = Field(default=1, ge=1)
    """Tensor-parallel size."""
    pp: int = Field(default=1, ge=1)
    """Pipeline-parallel size."""
    vpp: int = Field(default=1, ge=1)
    """Interleaved stages of each pipeline rank: more of them make the pipeline's bubble smaller, and its messages
    more."""
    stage_layers: list[Annotated[int, Field(ge=0)]] | None = None
    """Layers of each of the pp x vpp stages in model order, for uneven ones; None: as many in each."""
    cp: int = Field(default=1, ge=1)
    """Context-parallel size: the tokens of every sequence are spread over so many ranks, each of which attends to all
    of them. For sequences whose activations do not fit one rank."""
    ep: int = Field(default=1, ge=1)
    """Expert-parallel size: the experts of a mixture are spread over so many of the dp x cp ranks, and tokens go to
    where their experts are."""
    sequence_parallel: bool = False
    """Shard activations between tensor-parallel regions along the sequence."""
    distributed_optimizer: bool = True
    """Shard optimizer state over data-parallel ranks. One kind of optimizer does not read the other's checkpoints."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over data-parallel ranks bucket by bucket while the last micro-batch's backward still runs."""
    max_tokens_per_microbatch: int = Field(default=8192, ge=1)
    """Token budget of one micro-batch, over all `cp` ranks that share it; one response longer than this makes a
    micro-batch of its own."""
    share_prefix: Literal["auto"] | bool = "auto"
    """Compute a prompt's rows once for all its responses in a micro-batch. `auto`: where attention allows it."""

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one replica of the policy together: tp x pp x cp."""
        return self.tp * self.pp * self.cp

    @rule("pp", "vpp")
    def _interleaved(self) -> str | None:
        if self.vpp > 1 and self.pp == 1:
            return f"vpp = {self.vpp} needs pp above 1: it cuts each pipeline rank's layers into interleaved stages"
        return None

    @rule("pp", "vpp", "stage_layers")
    def _stage_layers(self) -> str | None:
        stages = self.pp * self.vpp
        if self.stage_layers is None or len(self.stage_layers) == stages > 1:
            return None
        if stages == 1:
            return "stage_layers needs pp above 1: there is one stage"
        return f"stage_layers names {len(self.stage_layers)} stages, pp = {self.pp} x vpp = {self.vpp} makes {stages}"

    @rule("tp", "sequence_parallel")
    def _sequence_parallel(self) -> str | None:
        if self.sequence_parallel and self.tp == 1:
            return "sequence_parallel = true needs tp above 1: it shards between tensor-parallel regions"
        return None
