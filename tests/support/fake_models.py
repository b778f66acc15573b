"""What generates behind the fake server's API: dice, or a real transformers model."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Protocol

import torch


class FakeModel(Protocol):
    """What generates behind the API."""

    def generate(self, ids: list[int], params: dict[str, Any]) -> tuple[list[int], list[float]]: ...

    def load(self, tensors: dict[str, torch.Tensor]) -> None: ...


class DiceModel:
    """Tokens at random, ended by the stop token in a quarter of the draws: no arithmetic, for tests of faults."""

    def __init__(self, vocab_size: int = 21, seed: int = 0) -> None:
        self.vocab_size, self.random = vocab_size, random.Random(seed)

    def generate(self, ids: list[int], params: dict[str, Any]) -> tuple[list[int], list[float]]:
        stops = params.get("stop_token_ids", [0])
        others = [token for token in range(self.vocab_size) if token not in stops]
        tokens: list[int] = []
        while len(tokens) < params["max_new_tokens"] and not (tokens and tokens[-1] in stops):
            tokens.append(self.random.choice(stops) if self.random.random() < 0.25 else self.random.choice(others))
        return tokens, [-self.random.random() for _ in tokens]

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        pass


class TransformersModel:
    """A transformers model, forward by forward without a cache."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def generate(self, ids: list[int], params: dict[str, Any]) -> tuple[list[int], list[float]]:
        greedy = params["temperature"] == 0
        tokens: list[int] = []
        logps: list[float] = []
        while len(tokens) < params["max_new_tokens"] and not (tokens and tokens[-1] in params["stop_token_ids"]):
            logits = self.model(torch.tensor([ids + tokens])).logits[0, -1]
            logp = (logits if greedy else logits / params["temperature"]).log_softmax(-1)
            token = int(logp.argmax() if greedy else torch.multinomial(logp.exp(), 1, generator=self.generator))
            tokens.append(token)
            logps.append(float(logp[token]))
        return tokens, logps

    @torch.no_grad()
    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        named = dict(self.model.named_parameters())
        for name, tensor in tensors.items():
            if name in named:  # a tied head comes under both names
                named[name].copy_(tensor)
