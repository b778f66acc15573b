"""Rewards that need no labels, and the controls they are compared with. `docs/rewards.md` lists them."""

from . import certainty, checking, controls, cross_vote, ensemble, judge, semantic
from .base import BINARY, UNIT, MissingSignalError, NonFiniteScoreError, NoOptions, Range, Reward, RewardError
from .combine import Combined, RewardResult, Term, build_terms, missing_signals
from .providers import Provider, ProviderContext, Respondent, get_provider, register_provider
from .registry import RewardInfo, available, describe, get_reward, register
from .voting import Vote, vote, vote_of

__all__ = [
    "BINARY",
    "UNIT",
    "Combined",
    "MissingSignalError",
    "NoOptions",
    "NonFiniteScoreError",
    "Provider",
    "ProviderContext",
    "Range",
    "Respondent",
    "Reward",
    "RewardError",
    "RewardInfo",
    "RewardResult",
    "Term",
    "Vote",
    "available",
    "build_terms",
    "certainty",
    "checking",
    "controls",
    "cross_vote",
    "describe",
    "ensemble",
    "get_provider",
    "get_reward",
    "judge",
    "missing_signals",
    "register",
    "register_provider",
    "semantic",
    "vote",
    "vote_of",
]
