"""Answers of servers are whole, finite and for the request, or they are faults of the right kind."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_urlvr.rollout.answers import Expected, read_answer
from megatron_urlvr.rollout.faults import Aborted, Fault

EXPECTED = Expected(
    "r1", prompt_tokens=3, max_new_tokens=4, vocab_size=21, stop_ids=frozenset([19]), versions={"v1": 1, "v2": 2}
)


def payload(tokens: list[int], reason: Any = None) -> dict[str, Any]:
    kind = {"type": "stop", "matched": 19} if tokens[-1] == 19 else {"type": "length", "length": len(tokens)}
    return {
        "output_ids": tokens,
        "meta_info": {
            "id": "r1",
            "finish_reason": reason or kind,
            "prompt_tokens": 3,
            "completion_tokens": len(tokens),
            "weight_version": "v1",
            "output_token_logprobs": [[-0.5 * (k + 1), token, None] for k, token in enumerate(tokens)],
        },
    }


def test_a_good_answer_gives_tokens_and_log_probs_in_order() -> None:
    answer = read_answer(payload([5, 6, 19]), EXPECTED)
    assert answer.tokens == [5, 6, 19]
    assert answer.finish == "stop"
    assert torch.equal(answer.logp, torch.tensor([-0.5, -1.0, -1.5]))


def test_a_stop_token_in_the_last_place_allowed_is_a_stop() -> None:
    assert read_answer(payload([1, 2, 3, 19], {"type": "length", "length": 4}), EXPECTED).finish == "stop"


def test_statistics_of_the_plug_in_come_along() -> None:
    good = payload([5, 19])
    good["meta_info"]["entropy"] = [0.25, 0.5]
    stats = read_answer(good, Expected(**vars(EXPECTED) | {"statistics": ("logp", "entropy")})).stats
    assert stats is not None
    assert torch.equal(stats.get("entropy"), torch.tensor([0.25, 0.5]))
    assert torch.equal(stats.get("logp"), torch.tensor([-0.5, -1.0]))


def test_statistics_that_are_missing_or_not_finite_are_a_fault() -> None:
    wanted = Expected(**vars(EXPECTED) | {"statistics": ("entropy",)})
    for values in (None, [0.5], [0.5, float("nan")]):
        bad = payload([5, 19])
        bad["meta_info"]["entropy"] = values
        with pytest.raises(Fault):
            read_answer(bad, wanted)


def spoil(path: str, value: Any) -> dict[str, Any]:
    """A good answer with one thing changed."""
    bad = copy.deepcopy(payload([5, 6, 19]))
    *way, last = path.split(".")
    here: Any = bad
    for part in way:
        here = here[int(part)] if part.isdigit() else here[part]
    here[int(last) if last.isdigit() else last] = value
    return bad


@pytest.mark.parametrize(
    ("path", "value", "kind"),
    [
        ("output_ids", None, "schema"),
        ("output_ids", [5, "6", 19], "schema"),
        ("output_ids", [5, True, 19], "schema"),
        ("output_ids", [], "length"),
        ("output_ids", [5, 6, 7, 8, 19], "length"),
        ("output_ids.1", 21, "token_range"),
        ("output_ids.1", -1, "token_range"),
        ("output_ids.1", 19, "finish"),
        ("output_ids.2", 7, "finish"),
        ("meta_info", None, "schema"),
        ("meta_info.id", "r2", "wrong_request"),
        ("meta_info.id", None, "wrong_request"),
        ("meta_info.weight_version", "v0", "version"),
        ("meta_info.weight_version", None, "version"),
        ("meta_info.weight_versions", [{"version": "v0"}, {"version": "v1"}], "version"),
        ("meta_info.weight_versions", ["v1"], "schema"),
        ("meta_info.completion_tokens", 2, "length"),
        ("meta_info.prompt_tokens", 2, "length"),
        ("meta_info.finish_reason", {"type": "abort", "message": "Aborted"}, "aborted"),
        ("meta_info.finish_reason", {"type": "length"}, "finish"),
        ("meta_info.finish_reason", None, "finish"),
        ("meta_info.output_token_logprobs", None, "logprob"),
        ("meta_info.output_token_logprobs", [[-0.5, 5, None]], "logprob"),
        ("meta_info.output_token_logprobs.0", [-0.5], "logprob"),
        ("meta_info.output_token_logprobs.0.1", 6, "logprob"),
        ("meta_info.output_token_logprobs.0.0", None, "logprob"),
        ("meta_info.output_token_logprobs.0.0", float("nan"), "logprob"),
        ("meta_info.output_token_logprobs.0.0", float("-inf"), "logprob"),
        ("meta_info.output_token_logprobs.0.0", 0.1, "logprob"),
    ],
)
def test_whatever_does_not_hold_is_a_fault_of_its_kind(path: str, value: Any, kind: str) -> None:
    with pytest.raises(Fault) as fault:
        read_answer(spoil(path, value), EXPECTED)
    assert fault.value.kind == kind


@pytest.mark.parametrize("body", [None, [], "text", 3, [payload([19])]])
def test_a_body_that_is_no_object_is_a_fault(body: Any) -> None:
    with pytest.raises(Fault) as fault:
        read_answer(body, EXPECTED)
    assert fault.value.kind == "schema"


def test_spans_say_which_weights_produced_which_tokens() -> None:
    mixed = payload([5, 6, 19])
    mixed["meta_info"]["weight_version"] = "v2"
    mixed["meta_info"]["weight_versions"] = [
        {"version": "v1", "start": 0, "end": 1},
        {"version": "v2", "start": 1, "end": 2},
        {"version": "v2", "start": 2, "end": 3},
    ]
    assert read_answer(mixed, EXPECTED).spans == ((1, 0, 1), (2, 1, 3))
    for end in (2, 4, None, "3"):
        mixed["meta_info"]["weight_versions"][-1]["end"] = end
        with pytest.raises(Fault, match=r"weight_versions covers|does not cover"):
            read_answer(mixed, EXPECTED)
    mixed["meta_info"]["weight_versions"][-1] = {"version": "v0", "start": 2, "end": 3}
    with pytest.raises(Fault, match="wanted v1 or v2, got v0, v1, v2"):
        read_answer(mixed, EXPECTED)


def test_what_an_aborted_response_holds_is_gone_on_from() -> None:
    with pytest.raises(Aborted) as given_up:
        read_answer(payload([5, 6], {"type": "abort", "message": "Aborted"}), EXPECTED)
    beginning = given_up.value.beginning
    assert beginning.tokens == [5, 6]
    rest = payload([7, 19])
    rest["meta_info"]["weight_version"], rest["meta_info"]["prompt_tokens"] = "v2", 5
    whole = read_answer(rest, replace(EXPECTED, prompt_tokens=5, max_new_tokens=2)).after(beginning)
    assert (whole.tokens, whole.finish, whole.spans) == ([5, 6, 7, 19], "stop", ((1, 0, 2), (2, 2, 4)))
    assert torch.equal(whole.logp, torch.tensor([-0.5, -1.0, -0.5, -1.0]))


@pytest.mark.parametrize("tokens", [[], [5, 19], [5, 6, 7, 8], [5, 21]])
def test_an_aborted_response_that_holds_nothing_or_is_not_sound_is_begun_anew(tokens: list[int]) -> None:
    bad = payload([5])
    bad["output_ids"] = tokens
    bad["meta_info"] |= payload(tokens)["meta_info"] if tokens else {"completion_tokens": 0}
    bad["meta_info"]["finish_reason"] = {"type": "abort"}
    with pytest.raises(Aborted) as given_up:
        read_answer(bad, EXPECTED)
    assert given_up.value.beginning is None
