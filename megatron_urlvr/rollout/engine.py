"""The interface of everything that turns prompts into groups of responses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from ..types import Group, Prompt, Sampling


class RolloutEngine(ABC):
    """Generates responses with the weights it was last given.

    Invariants: groups come back complete, each once, in any order; a sample's tokens depend on the weights, the
    prompt, `Sampling` and the sample's index alone, never on what shares its batch. Between `begin_update` and
    `resume` nothing is generated.
    """

    overlaps: bool = False
    """Generates while this process does other things: `start` begins at once, and goes on across updates."""

    shares_memory: bool = False
    """Generates on the trainer's own GPUs: between `sleep` and `end_update` their memory is the trainer's."""

    version: int = 0
    """Version of the weights in use."""

    interrupted: Callable[[], bool] = staticmethod(lambda: False)
    """Whether the process was asked to stop: an engine that waits for something raises `Abandoned` then."""

    def begin_step(self, step: int) -> None:  # noqa: B027 - sampling engines need no notice
        """The prompts that come next belong to training step `step`."""

    @abstractmethod
    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Group]:
        """`sampling.n` samples for each prompt, as groups finish."""

    def start(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, keep: Callable[[Group], None] | None = None
    ) -> Iterator[Group]:
        """As `generate`, for groups that are wanted later; what `generate` is asked for goes first. Where the engine
        `overlaps` it begins at once. `keep` gets each group when it is finished, maybe on another thread."""
        for group in self.generate(prompts, sampling):
            if keep is not None:
                keep(group)
            yield group

    def sleep(self) -> None:  # noqa: B027 - engines of their own share nothing
        """Hand the memory of weights and cache over until `end_update`; nothing is generated meanwhile. Only where the
        engine `shares_memory`."""

    @abstractmethod
    def begin_update(self, version: int) -> None:
        """Announce new weights; generation rests until `resume`."""

    @abstractmethod
    def update(self, bucket: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take a part of the stream of Hugging Face-named tensors; nothing of it is kept by reference."""

    @abstractmethod
    def end_update(self) -> None:
        """All tensors have been handed over: serve the announced version."""

    def resume(self) -> None:  # noqa: B027 - engines of their own have nothing to wait for
        """Every replica's engine has ended the update: generation goes on."""

    def metrics(self) -> dict[str, float]:
        """What the engine measured since the last call; counts, which add up over replicas."""
        return {}

    def close(self) -> None:  # noqa: B027 - most engines have nothing to release
        """Release what the engine holds."""
