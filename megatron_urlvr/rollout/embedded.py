"""The embedded engine: a transformers model in the trainer's process, fed by the policy's stream of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from ..types import Group, Prompt, Sample, Sampling
from .engine import RolloutEngine
from .sampling import pick, sample_seeds, uniforms

COMPACT_BELOW = 0.75
"""Finished rows leave the batch once fewer than this share of its rows is alive: copying the cache costs too."""


class EmbeddedEngine(RolloutEngine):
    """Batched sampling with a KV cache; the votes of one prompt share its prefill."""

    def __init__(
        self,
        *,
        folder: str,
        decode: Callable[[Sequence[int]], str],
        stop_ids: frozenset[int],
        device: torch.device,
        dtype: torch.dtype,
        vocab_size: int,
        max_batch: int,
    ) -> None:
        """`vocab_size`: entries that may be sampled; `stop_ids`: tokens that end a response."""
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        self.model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        self.model = self.model.to(device).eval().requires_grad_(False)
        self.decode = decode
        self.stop_ids = stop_ids
        self.stop = torch.tensor(sorted(stop_ids), device=device)
        self.device = device
        self.vocab_size = vocab_size
        self.max_batch = max_batch
        self.version = 0
        self._pending: int | None = None
        self._targets = dict(self.model.named_parameters())

    # -- weights ------------------------------------------------------------------------------------------------------

    def begin_update(self, version: int) -> None:
        """See RolloutEngine."""
        self._pending = version

    @torch.no_grad()
    def update(self, bucket: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy tensors in by name. KeyError names a tensor the model does not have."""
        for name, tensor in bucket:
            self._targets[name].copy_(tensor)

    def end_update(self) -> None:
        """See RolloutEngine."""
        assert self._pending is not None, "end_update without begin_update"
        self.version, self._pending = self._pending, None

    # -- generation ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Group]:
        """Groups in prompt order, a batch of prompts at a time."""
        assert self._pending is None, "generate between begin_update and end_update"
        per_batch = max(1, self.max_batch // sampling.n)
        for start in range(0, len(prompts), per_batch):
            part = prompts[start : start + per_batch]
            tokens, logps = self._decode_batch(part, sampling)
            for g, prompt in enumerate(part):
                rows = range(g * sampling.n, (g + 1) * sampling.n)
                samples = [self._sample(prompt, k, tokens[row], logps[row]) for k, row in enumerate(rows)]
                yield Group(prompt, samples)

    def _sample(self, prompt: Prompt, index: int, tokens: list[int], logps: list[float]) -> Sample:
        stopped = tokens[-1] in self.stop_ids
        return Sample(
            prompt_id=prompt.id,
            index=index,
            tokens=tokens,
            text=self.decode(tokens[:-1] if stopped else tokens),
            finish="stop" if stopped else "length",
            logp=torch.tensor(logps, dtype=torch.float32),
            version=self.version,
        )

    def _decode_batch(self, prompts: Sequence[Prompt], sampling: Sampling) -> tuple[list[list[int]], list[list[float]]]:
        """Tokens and log-probs of all samples of `prompts`, `[len(prompts) * n]` lists."""
        n, steps = sampling.n, sampling.max_new_tokens
        total = len(prompts) * n
        cache, logits, attention = self._prefill(prompts, n)
        seeds = sample_seeds(sampling.seed, [prompt.id for prompt in prompts], n)
        live = torch.arange(total, device=self.device)
        out = torch.zeros(total, steps, dtype=torch.int64, device=self.device)
        out_logp = torch.zeros(total, steps, device=self.device)
        lengths = torch.full((total,), steps, device=self.device)
        alive = torch.ones(total, dtype=torch.bool, device=self.device)
        for step in range(steps):
            chosen, logp = self._choose(logits, seeds, step, sampling)
            out[live, step], out_logp[live, step] = chosen, logp
            ended = torch.isin(chosen, self.stop) & alive
            lengths[live[ended]] = step + 1
            alive = alive & ~ended
            remaining = int(alive.sum())
            if step == steps - 1 or remaining == 0:
                break
            if remaining < COMPACT_BELOW * len(alive):
                keep = alive.nonzero()[:, 0]
                cache.batch_select_indices(keep)
                live, chosen, seeds = live[keep], chosen[keep], seeds[keep.cpu().numpy()]
                attention = None if attention is None else attention[keep]
                alive = alive[keep]
            if attention is not None:
                attention = torch.cat([attention, attention.new_ones(len(live), 1)], 1)
            logits = self._forward(chosen[:, None], cache, attention)
        sizes = lengths.tolist()
        tokens, logps = out.tolist(), out_logp.tolist()
        return [t[:k] for t, k in zip(tokens, sizes, strict=True)], [p[:k] for p, k in zip(logps, sizes, strict=True)]

    def _prefill(self, prompts: Sequence[Prompt], n: int) -> tuple[Any, torch.Tensor, torch.Tensor | None]:
        """Run each prompt once (left-padded where lengths differ) and repeat its cache for its `n` samples."""
        longest = max(len(prompt.tokens) for prompt in prompts)
        padded = [[0] * (longest - len(prompt.tokens)) + list(prompt.tokens) for prompt in prompts]
        ids = torch.tensor(padded, device=self.device)
        attention = None
        if any(len(prompt.tokens) != longest for prompt in prompts):
            sizes = torch.tensor([len(prompt.tokens) for prompt in prompts], device=self.device)
            attention = (torch.arange(longest, device=self.device) >= longest - sizes[:, None]).long()
        cache = DynamicCache(config=self.model.config)
        logits = self._forward(ids, cache, attention)
        cache.batch_repeat_interleave(n)
        if attention is not None:
            attention = attention.repeat_interleave(n, 0)
        return cache, logits.repeat_interleave(n, 0), attention

    def _forward(self, ids: torch.Tensor, cache: Any, attention: torch.Tensor | None) -> torch.Tensor:
        """Logits of the last position, `[N, V]` float32 over the entries that may be sampled."""
        positions = None
        if attention is not None:
            positions = (attention.cumsum(-1) - 1).clamp_(min=0)[:, -ids.shape[1] :]
        output = self.model(
            input_ids=ids,
            attention_mask=attention,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1, : self.vocab_size].float()

    def _choose(
        self, logits: torch.Tensor, seeds: np.ndarray, step: int, sampling: Sampling
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Next tokens `[N]` and their log-probs at the sampling temperature, before any truncation."""
        greedy = sampling.temperature == 0
        scaled = logits if greedy else logits / sampling.temperature
        chosen = scaled.argmax(-1) if greedy else pick(scaled, uniforms(seeds, step), top_p=sampling.top_p)
        logp = scaled.log_softmax(-1).gather(-1, chosen[:, None])[:, 0]
        return chosen, logp
