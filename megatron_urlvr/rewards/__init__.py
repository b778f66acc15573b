"""Rewards that need no labels, and the controls they are compared with. `docs/rewards.md` lists them."""

from . import certainty, controls, ensemble
from .base import MissingSignalError, NonFiniteScoreError, NoOptions, Provider, Reward, RewardError
from .combine import Combined, RewardResult, Term, build_terms, missing_signals
from .registry import RewardInfo, available, describe, get_reward, register
from .voting import Vote, vote, vote_of

__all__ = [
    "Combined",
    "MissingSignalError",
    "NoOptions",
    "NonFiniteScoreError",
    "Provider",
    "Reward",
    "RewardError",
    "RewardInfo",
    "RewardResult",
    "Term",
    "Vote",
    "available",
    "build_terms",
    "certainty",
    "controls",
    "describe",
    "ensemble",
    "get_reward",
    "missing_signals",
    "register",
    "vote",
    "vote_of",
]
