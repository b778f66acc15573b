"""Answers of `/generate`, checked: nothing reaches the trainer that is not whole, finite and for this very request."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..types import FinishReason, TokenStats
from .faults import Fault

LOGP_SLACK = 1e-4
"""A log-probability may exceed 0 by rounding alone."""


@dataclass(frozen=True)
class Expected:
    """What an answer must agree with."""

    request: str
    """The id the request was sent under."""
    prompt_tokens: int
    max_new_tokens: int
    vocab_size: int
    stop_ids: frozenset[int]
    label: str
    """Label of the weights that every token must come from."""
    statistics: tuple[str, ...] = ()
    """Per-token statistics that the servers' plug-in must return, by their names in TokenStats."""


@dataclass(frozen=True)
class Answer:
    """One response, checked."""

    tokens: list[int]
    logp: torch.Tensor
    """`[T]` float32, nats."""
    finish: FinishReason
    stats: TokenStats | None = field(default=None)


def read_answer(payload: Any, expected: Expected) -> Answer:
    """The answer in `payload`, the parsed body of a `/generate` call. Fault where anything does not hold."""
    tokens, meta = _shape(payload)
    if meta.get("id") != expected.request:
        raise Fault("wrong_request", f"asked as {expected.request!r}, answered as {meta.get('id')!r}")
    reason = meta.get("finish_reason")
    kind = reason.get("type") if isinstance(reason, Mapping) else reason
    if kind == "abort":
        raise Fault("aborted", str(reason.get("message", "")) if isinstance(reason, Mapping) else "")
    _versions(meta, expected.label)
    if outside := [token for token in tokens if not 0 <= token < expected.vocab_size]:
        raise Fault("token_range", f"token {outside[0]} with a vocabulary of {expected.vocab_size}")
    _lengths(tokens, meta, expected)
    finish = _finish(tokens, kind, expected)
    logp = _logp(tokens, meta.get("output_token_logprobs"))
    return Answer(tokens, torch.tensor(logp, dtype=torch.float32), finish, _statistics(logp, meta, expected))


def _shape(payload: Any) -> tuple[list[int], Mapping[str, Any]]:
    if not isinstance(payload, Mapping):
        raise Fault("schema", f"the body is a {type(payload).__name__}, not an object")
    tokens, meta = payload.get("output_ids"), payload.get("meta_info")
    if not isinstance(meta, Mapping):
        raise Fault("schema", "no meta_info")
    if not isinstance(tokens, list) or any(type(token) is not int for token in tokens):
        raise Fault("schema", "output_ids is not a list of integers")
    return tokens, meta


def _versions(meta: Mapping[str, Any], label: str) -> None:
    """All spans were generated with the weights asked for."""
    spans = meta.get("weight_versions") or []
    if not isinstance(spans, list) or any(not isinstance(span, Mapping) for span in spans):
        raise Fault("schema", "weight_versions is not a list of objects")
    seen = {meta.get("weight_version"), *(span.get("version") for span in spans)}
    if seen != {label}:
        raise Fault("version", f"wanted {label}, got {', '.join(sorted(map(str, seen)))}")


def _lengths(tokens: list[int], meta: Mapping[str, Any], expected: Expected) -> None:
    if not 1 <= len(tokens) <= expected.max_new_tokens:
        raise Fault("length", f"{len(tokens)} tokens, asked for 1 to {expected.max_new_tokens}")
    if meta.get("completion_tokens") != len(tokens):
        raise Fault("length", f"completion_tokens = {meta.get('completion_tokens')} with {len(tokens)} tokens")
    if meta.get("prompt_tokens") != expected.prompt_tokens:
        raise Fault("length", f"prompt_tokens = {meta.get('prompt_tokens')}, sent {expected.prompt_tokens}")


def _finish(tokens: list[int], kind: Any, expected: Expected) -> FinishReason:
    """The reason as the tokens show it. SGLang says `length` when a stop token is the last one allowed."""
    if early := [token for token in tokens[:-1] if token in expected.stop_ids]:
        raise Fault("finish", f"went on after the stop token {early[0]}")
    stopped = tokens[-1] in expected.stop_ids
    full = len(tokens) == expected.max_new_tokens
    if kind == "stop" and stopped:
        return "stop"
    if kind == "length" and full:
        return "stop" if stopped else "length"
    raise Fault("finish", f"reason {kind!r} after {len(tokens)} of {expected.max_new_tokens} tokens, last {tokens[-1]}")


def _logp(tokens: list[int], entries: Any) -> list[float]:
    if not isinstance(entries, list) or len(entries) != len(tokens):
        count = len(entries) if isinstance(entries, list) else "no"
        raise Fault("logprob", f"{count} log-probs for {len(tokens)} tokens")
    values = []
    for token, entry in zip(tokens, entries, strict=True):
        if not isinstance(entry, list) or len(entry) < 2:
            raise Fault("logprob", f"{entry!r} is no [log-prob, token]")
        value, of = entry[0], entry[1]
        if type(of) is not int or of != token:
            raise Fault("logprob", f"a log-prob of token {of!r} where the response has {token}")
        if not _finite(value) or value > LOGP_SLACK:
            raise Fault("logprob", f"log-prob {value!r}")
        values.append(float(value))
    return values


def _statistics(logp: list[float], meta: Mapping[str, Any], expected: Expected) -> TokenStats | None:
    if not expected.statistics:
        return None
    found = {"logp": torch.tensor(logp, dtype=torch.float32)}
    for name in expected.statistics:
        if name == "logp":
            continue
        values = meta.get(name)
        if not isinstance(values, list) or len(values) != len(logp) or not all(_finite(v) for v in values):
            raise Fault("schema", f"no finite {name} for each of the {len(logp)} tokens")
        found[name] = torch.tensor(values, dtype=torch.float32)
    return TokenStats(**found)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
