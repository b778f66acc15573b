"""Token statistics of a language model's vocabulary head: log-prob, entropy, self-certainty and what goes with them.

`lm_head_stats` computes them from hidden states and the (vocabulary-parallel) head without whole logits ever existing,
forward and backward; `logits_stats` from logits that exist. `reference` is the plain oracle. Depends on torch alone.
"""

from .api import DEFAULT_STASH_BYTES, DEFAULT_WORKSPACE_BYTES, lm_head_stats, logits_stats
from .stats import DIFFERENTIABLE, IGNORED, OUTPUTS, TokenStats

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_STASH_BYTES",
    "DEFAULT_WORKSPACE_BYTES",
    "DIFFERENTIABLE",
    "IGNORED",
    "OUTPUTS",
    "TokenStats",
    "lm_head_stats",
    "logits_stats",
]
