"""A mixture of experts, as far as its config tells: how many weights are experts', and how many a token meets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...policy.hf.families import experts_of, shape_of


@dataclass(frozen=True)
class Mixture:
    """Experts of every layer of a model; a dense one has none."""

    layers: int
    experts: int
    """Of a layer; 0 in a dense model."""
    chosen: int
    """Experts that a token goes to."""
    expert_weights: int
    """Of one expert."""

    @property
    def parameters(self) -> int:
        """Of all experts of the model."""
        return self.layers * self.experts * self.expert_weights

    @property
    def idle_parameters(self) -> int:
        """Of the experts that a token does not go to."""
        return self.layers * (self.experts - self.chosen) * self.expert_weights

    def touched(self, tokens: float) -> float:
        """Share of the experts that a batch of `tokens` reads, where every token chooses evenly and by itself:
        1 - (1 - chosen / experts)^tokens. 1 in a dense model."""
        return 1 - (1 - self.chosen / self.experts) ** tokens if self.experts else 1.0


def mixture_of(hf: Mapping[str, Any]) -> Mixture:
    """The experts of a model, from its config.json."""
    shape = shape_of(hf, tp=1)
    if not shape.experts:
        return Mixture(int(hf["num_hidden_layers"]), 0, 0, 0)
    weights = 3 * shape.hidden * shape.expert_ffn
    return Mixture(int(hf["num_hidden_layers"]), experts_of(hf), int(hf["num_experts_per_tok"]), weights)
