"""Answers to `/generate` that are wrong on purpose, each in one way."""

from __future__ import annotations

import json
from typing import Any

from aiohttp import web

FAULTS = (
    "400",
    "500",
    "reset",
    "truncated",
    "not_json",
    "nan",
    "short_logprobs",
    "other_token",
    "outside_vocabulary",
    "too_many_tokens",
    "wrong_request",
    "stale",
    "abort",
    "went_on",
    "hang",
)


def spoil(fault: str | None, answer: dict[str, Any], params: dict[str, Any], vocab_size: int) -> None:
    """Change `answer` as `fault` says; of a fault that is not in the answer itself, nothing."""
    tokens, meta = answer["output_ids"], answer["meta_info"]
    entries = meta["output_token_logprobs"]
    if fault == "nan":
        entries[-1][0] = float("nan")
    elif fault == "short_logprobs":
        entries.pop()
    elif fault == "other_token":
        entries[0][1] += 1
    elif fault == "outside_vocabulary":
        tokens[0] = entries[0][1] = vocab_size
    elif fault == "too_many_tokens":
        extra = params["max_new_tokens"] + 1 - len(tokens)
        tokens.extend([0] * extra)
        entries.extend([[-1.0, 0, None]] * extra)
        meta["completion_tokens"] = len(tokens)
    elif fault == "wrong_request":
        meta["id"] = "somebody else's"
    elif fault == "stale":
        meta["weight_version"] = "older"
    elif fault == "abort":
        meta["finish_reason"] = {"type": "abort", "message": "Aborted"}
        del tokens[len(tokens) // 2 :], entries[len(entries) // 2 :]
        meta["completion_tokens"], meta["weight_versions"] = len(tokens), []
    elif fault == "went_on":
        tokens.insert(0, params["stop_token_ids"][0])
        entries.insert(0, [-1.0, tokens[0], None])
        del tokens[params["max_new_tokens"] :], entries[params["max_new_tokens"] :]
        meta["completion_tokens"] = len(tokens)
        if len(tokens) == 1:
            meta["finish_reason"] = {"type": "abort"}


async def sent(request: web.Request, fault: str | None, answer: dict[str, Any]) -> web.StreamResponse:
    """The answer on its way, broken off or cut as `fault` says."""
    text = json.dumps(answer)
    if fault == "not_json":
        text = text[: len(text) // 2]
    if fault == "truncated":
        response = web.StreamResponse(headers={"Content-Length": str(len(text)), "Content-Type": "text/json"})
        await response.prepare(request)
        await response.write(text[: len(text) // 2].encode())
        assert request.transport is not None
        request.transport.close()
        return response
    return web.Response(text=text, content_type="application/json")
