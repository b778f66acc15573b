"""What the trainer relies on in a server, as tests that run against the fake and against the real one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_urlvr.config.servers import ServersSection
from megatron_urlvr.rollout.client import ServerClient
from megatron_urlvr.rollout.dispatch import Model
from megatron_urlvr.rollout.faults import Fault
from megatron_urlvr.rollout.sglang import SGLangEngine
from megatron_urlvr.rollout.sleep import ASLEEP, marker, settle
from megatron_urlvr.types import Group, Prompt, Sample, Sampling, Span

VOCAB, STOP = 21, 19
TOLERANCE = 1e-4
UPDATES = 5
"""While responses are under way."""


@dataclass
class Target:
    """A server under test, and the folder whose weights it was started with."""

    url: str
    folder: Path


def prompts(count: int) -> list[Prompt]:
    """Prompts of different lengths."""
    return [Prompt(f"p{k}", "", tuple((7 * k + i) % 17 for i in range(3 + k % 4))) for k in range(count)]


def engine_for(
    urls: list[str], folder: Path, work: Path, *, statistics: tuple[str, ...] = (), **settings: Any
) -> SGLangEngine:
    """An engine on servers given by URL; labels differ between engines."""
    servers = ServersSection.model_validate({"pools": {"policy": {"urls": urls}}, "wait_s": 60} | settings)
    return SGLangEngine(
        servers,
        folder=work / "servers",
        model=folder,
        decode=lambda tokens: " ".join(map(str, tokens)),
        served=Model(VOCAB, frozenset([STOP]), statistics),
        device=torch.device("cpu"),
        session=f"{work.name}-{abs(hash(str(work))) % 10**6}",
    )


def noisy(folder: Path, seed: int) -> dict[str, torch.Tensor]:
    """The folder's weights with noise of their own size: other weights of the same shapes."""
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(folder / "model.safetensors")
    return {
        name: t + 0.3 * t.std().nan_to_num() * torch.randn(t.shape, generator=generator) for name, t in tensors.items()
    }


def blank(folder: Path) -> dict[str, torch.Tensor]:
    """Weights under which all tokens are equally likely: of 64 responses of 10 tokens, 39 % end early, and not all or
    none do but once in 10¹³."""
    return {name: torch.zeros_like(t) for name, t in load_file(folder / "model.safetensors").items()}


def wordy(folder: Path, seed: int) -> dict[str, torch.Tensor]:
    """Noisy weights under which responses are long: the stop token's logit is 0, whatever came before."""
    weights = noisy(folder, seed)
    for name in weights.keys() & {"lm_head.weight", "model.embed_tokens.weight"}:
        weights[name][STOP] = 0
    return weights


def push(engine: SGLangEngine, weights: dict[str, torch.Tensor], version: int) -> None:
    """As the trainer does it."""
    engine.begin_update(version)
    engine.update(iter(weights.items()))
    engine.end_update()
    engine.resume()


def oracle(folder: Path, weights: dict[str, torch.Tensor] | None = None) -> Any:
    """transformers' own model, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    if weights is not None:
        model.load_state_dict(weights, strict=False)
    return model


def differences(model: Any, group: Group, sample: Sample, temperature: float = 1.0) -> torch.Tensor:
    """`[T]` between the log-probs that came back and the oracle's of the same tokens."""
    ids = torch.tensor([[*group.prompt.tokens, *sample.tokens]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(group.prompt.tokens) - 1 : -1]
    logp = (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(sample.tokens)[:, None])[:, 0]
    assert sample.logp is not None
    return (logp - sample.logp).abs()


def largest_difference(model: Any, groups: list[Group], temperature: float) -> float:
    """Over all tokens of all groups."""
    return max(float(differences(model, group, sample, temperature).max()) for group in groups for sample in group)


class ServerContract:
    """Subclasses give the fixture `target`."""

    @pytest.fixture
    def engine(self, target: Target, tmp_path: Path) -> Iterator[SGLangEngine]:
        engine = engine_for([target.url], target.folder, tmp_path, transport="disk")
        yield engine
        engine.close()

    def call(
        self,
        engine: SGLangEngine,
        target: Target,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        method: str = "POST",
    ) -> Any:
        """One raw call."""

        async def work() -> Any:
            client = ServerClient(engine.loop.session, target.url)
            return await client.call(path, body or {}, timeout=60, method=method)

        return engine.loop.run(work())

    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    @pytest.mark.parametrize("transport", ["disk", "group"])
    def test_log_probs_are_those_of_the_weights_that_were_pushed(
        self, target: Target, tmp_path: Path, transport: str, temperature: float
    ) -> None:
        engine = engine_for([target.url], target.folder, tmp_path, transport=transport, bucket_mb=1)
        try:
            for version in (0, 1, 2):
                weights = noisy(target.folder, version)
                push(engine, weights, version)
                groups = list(engine.generate(prompts(4), Sampling(6, 12, temperature)))
                assert sorted(group.prompt.id for group in groups) == ["p0", "p1", "p2", "p3"]
                assert all(len(group) == 6 for group in groups)
                assert {sample.version for group in groups for sample in group} == {version}
                assert largest_difference(oracle(target.folder, weights), groups, temperature) < TOLERANCE
            assert engine.metrics()["rollout/faults"] == 0
        finally:
            engine.close()

    @pytest.mark.parametrize(("transport", "pause"), [("disk", "retract"), ("group", "retract"), ("group", "in_place")])
    def test_responses_under_way_go_on_with_the_new_weights_and_say_from_which_token_on(
        self, target: Target, tmp_path: Path, transport: str, pause: str
    ) -> None:
        engine = engine_for([target.url], target.folder, tmp_path, transport=transport, pause=pause)
        engine.limit = 8  # of 192, so that some are under way when the first prompt's are done, and long afterwards
        weights = [wordy(target.folder, 10), wordy(target.folder, 11)]
        try:
            push(engine, weights[0], 0)
            flight = engine.start(prompts(32), Sampling(6, 40))
            groups = []
            for version in range(1, UPDATES + 1):  # one may come when the busy servers have just finished what they had
                groups.append(next(flight))
                push(engine, weights[version % 2], version)
            groups += flight
            assert engine.metrics()["rollout/faults"] == 0
        finally:
            engine.close()
        assert len(groups) == 32
        samples = [sample for group in groups for sample in group]
        assert any(len(sample.spans) > 1 for sample in samples), "no response met an update"
        assert {0, UPDATES} <= {sample.version for sample in samples}
        models = [oracle(target.folder, each) for each in weights]
        for group in groups:
            for sample in group:
                spans = sample.spans or (Span(sample.version, 0, sample.length),)
                versions = [span.version for span in spans]
                assert versions == sorted(set(versions))
                for version, start, end in spans:
                    if pause == "in_place":
                        continue  # computed on what the old weights had computed of it, or of its prompt
                    difference = differences(models[version % 2], group, sample)[start:end]
                    assert float(difference.max()) < TOLERANCE

    def test_what_is_asked_after_an_update_in_place_finds_nothing_of_older_weights_in_the_cache(
        self, target: Target, tmp_path: Path
    ) -> None:
        engine = engine_for([target.url], target.folder, tmp_path, transport="group", pause="in_place")
        try:
            for version in (0, 1):
                weights = wordy(target.folder, 20 + version)
                push(engine, weights, version)
                groups = list(engine.generate(prompts(6), Sampling(2, 12)))
                assert largest_difference(oracle(target.folder, weights), groups, 1.0) < TOLERANCE
                assert {sample.version for group in groups for sample in group} == {version}
        finally:
            engine.close()

    def test_the_cache_of_prefixes_is_one_for_each_extra_key(self, target: Target, engine: SGLangEngine) -> None:
        push(engine, noisy(target.folder, 21), 0)  # which empties it
        params = {"max_new_tokens": 2, "temperature": 1.0, "top_p": 1.0, "stop_token_ids": []}
        ids, cached = [3, 1, 4, 1, 5, 9, 2, 6], []
        for number, key in enumerate(("one", "one", "other", "other")):
            body = {"input_ids": ids, "rid": f"cache/{number}", "extra_key": key, "sampling_params": params}
            cached.append(self.call(engine, target, "/generate", body)["meta_info"]["cached_tokens"])
        assert cached == [0, len(ids) - 1, 0, len(ids) - 1]

    def test_colocated_servers_sleep_and_wake_with_the_new_weights(self, target: Target, tmp_path: Path) -> None:
        engine = engine_for([target.url], target.folder, tmp_path, transport="disk", colocated=True)
        try:
            for version in (0, 1, 2):
                weights = noisy(target.folder, 30 + version)
                push(engine, weights, version)
                groups = list(engine.generate(prompts(4), Sampling(4, 12)))
                assert largest_difference(oracle(target.folder, weights), groups, 1.0) < TOLERANCE
                assert {sample.version for group in groups for sample in group} == {version}
                engine.sleep()
                held = self.call(engine, target, "/model_info", method="GET")["weight_version"]
                assert (held, marker(tmp_path / "servers").exists()) == (ASLEEP, True)
            assert engine.metrics()["rollout/faults"] == 0
            push(engine, weights, 3)
            assert not marker(tmp_path / "servers").exists()
        finally:
            engine.close()

    def test_a_new_trainer_finds_servers_asleep_and_wakes_them(self, target: Target, tmp_path: Path) -> None:
        """The one before was killed while it trained."""
        for work in (tmp_path / "first", tmp_path / "second"):
            engine = engine_for([target.url], target.folder, work, transport="disk", colocated=True)
            try:
                settle(engine.settings, work / "servers", hosts=1, interrupted=lambda: False)
                weights = noisy(target.folder, 40)
                push(engine, weights, 0)
                groups = list(engine.generate(prompts(2), Sampling(4, 8)))
                assert largest_difference(oracle(target.folder, weights), groups, 1.0) < TOLERANCE
                engine.sleep()
            finally:
                engine.close()
        engine = engine_for([target.url], target.folder, tmp_path / "third", transport="disk", colocated=True)
        push(engine, weights, 0)  # awake for whoever comes next
        engine.close()

    def test_temperature_zero_takes_the_likeliest_token(self, target: Target, engine: SGLangEngine) -> None:
        weights = noisy(target.folder, 5)
        push(engine, weights, 0)
        model = oracle(target.folder, weights)
        for group in engine.generate(prompts(3), Sampling(1, 8, 0.0)):
            tokens = group.samples[0].tokens
            for place, token in enumerate(tokens):
                with torch.no_grad():
                    logits = model(torch.tensor([[*group.prompt.tokens, *tokens[:place]]])).logits[0, -1]
                assert logits.max() - logits[token] < TOLERANCE

    def test_a_response_ends_with_its_stop_token_or_at_the_limit(self, target: Target, engine: SGLangEngine) -> None:
        push(engine, blank(target.folder), 0)
        finishes = set()
        for group in engine.generate(prompts(8), Sampling(8, 10)):
            for sample in group:
                assert STOP not in sample.tokens[:-1]
                assert (sample.finish == "stop") == (sample.tokens[-1] == STOP)
                assert sample.finish == "stop" or len(sample.tokens) == 10
                finishes.add(sample.finish)
        assert finishes == {"stop", "length"}

    def test_a_snapshot_and_a_broadcast_leave_the_same_weights(self, target: Target, tmp_path: Path) -> None:
        weights = noisy(target.folder, 7)
        greedy = {}
        for transport in ("disk", "group"):
            engine = engine_for([target.url], target.folder, tmp_path / transport, transport=transport)
            try:
                push(engine, weights, 3)
                groups = engine.generate(prompts(6), Sampling(1, 16, 0.0))
                greedy[transport] = {group.prompt.id: group.samples[0].tokens for group in groups}
            finally:
                engine.close()
        assert greedy["disk"] == greedy["group"]

    def test_a_bucket_outside_an_update_is_refused(self, target: Target, engine: SGLangEngine) -> None:
        body = {"names": [], "dtypes": [], "shapes": [], "group_name": "nobody", "load_format": "flattened_bucket"}
        with pytest.raises(Fault) as fault:
            self.call(engine, target, "/update_weights_from_distributed", body)
        assert fault.value.kind == "http_4xx"

    def test_a_prompt_beyond_the_context_is_refused(self, target: Target, engine: SGLangEngine) -> None:
        params = {"max_new_tokens": 4, "temperature": 1.0, "top_p": 1.0, "stop_token_ids": [STOP]}
        body = {"input_ids": [1] * 80, "rid": "too long", "return_logprob": True, "sampling_params": params}
        with pytest.raises(Fault) as fault:
            self.call(engine, target, "/generate", body)
        assert fault.value.kind == "http_4xx"

    def test_a_server_with_other_weights_is_fenced_and_brought_up_to_date(
        self, target: Target, engine: SGLangEngine, tmp_path: Path
    ) -> None:
        weights = noisy(target.folder, 8)
        push(engine, weights, 0)
        other = engine_for([target.url], target.folder, tmp_path / "other", transport="disk")
        try:
            push(other, noisy(target.folder, 9), 0)  # somebody else's weights, under our feet
        finally:
            other.close()
        groups = list(engine.generate(prompts(4), Sampling(4, 8)))
        assert largest_difference(oracle(target.folder, weights), groups, 1.0) < TOLERANCE
        assert engine.metrics()["rollout/faults/version"] > 0
