"""The rollout engines of a run: the policy's own, another model's beside it, and servers that keep their weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..config.checks import SERVER_MARGIN
from ..config.root import Config
from ..data.tokenizer import load_tokenizer, stop_ids
from ..policy.hf.folder import read_config
from ..policy.policy import Policy
from ..rollout.dispatch import Model
from ..rollout.embedded import EmbeddedEngine
from ..rollout.engine import RolloutEngine
from ..rollout.frozen import FrozenServers
from ..rollout.replay import ReplayEngine
from ..rollout.sglang import SGLangEngine
from ..rollout.supervisor import server_statistics
from ..run.folder import RunDir
from .signals import ModelRespondent


def build_engine(config: Config, policy: Policy, tokenizer: PreTrainedTokenizerBase, session: str) -> RolloutEngine:
    """The engine of `rollout.engine`, on a replica's leader. `session`: a name for this process, or these processes
    together, that no earlier one had."""
    if config.rollout.engine == "sglang":
        return _sglang_engine(config, policy, tokenizer, session)
    if config.rollout.engine == "replay":
        return ReplayEngine(config.rollout.replay_from or "")
    return embedded_engine(
        config.model.path,
        policy,
        tokenizer,
        max_batch=config.rollout.batch,
        vocab_size=real_vocab(config, tokenizer),
    )


def _sglang_engine(config: Config, policy: Policy, tokenizer: PreTrainedTokenizerBase, session: str) -> SGLangEngine:
    stops = stop_ids(tokenizer, config.model.path)
    served = Model(int(policy.hf["vocab_size"]), stops, server_statistics(config))
    return SGLangEngine(
        config.servers,
        folder=RunDir(config.run.dir).servers,
        model=Path(config.model.path),
        decode=decoder(tokenizer),
        served=served,
        device=policy.layout.device,
        session=session,
        replicas=policy.layout.dp,
        pushes=policy.layout.is_main,
    )


def decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[int]], str]:
    """Token ids to text, special tokens left out."""
    return lambda tokens: str(tokenizer.decode(list(tokens), skip_special_tokens=True))


def embedded_engine(
    folder: str | Path,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_batch: int,
    vocab_size: int | None = None,
) -> EmbeddedEngine:
    """A transformers model of the policy's shape; it holds random weights until the first update."""
    return EmbeddedEngine(
        folder=str(folder),
        decode=decoder(tokenizer),
        stop_ids=stop_ids(tokenizer, folder),
        device=policy.layout.device,
        dtype=policy.dtype,
        vocab_size=vocab_size or int(policy.hf["vocab_size"]),
        max_batch=max_batch,
    )


def positions(hf: Mapping[str, Any]) -> int:
    """Positions of a model; servers may have fewer, and then say so."""
    return int(hf.get("max_position_embeddings", 2**31))


def frozen_servers(config: Config, pool: str, *, replicas: int, like: RolloutEngine | None) -> ModelRespondent:
    """Servers of a pool that keep their own weights, as somebody to ask. `replicas` share their limits; `like`: the
    policy's engine, whose interruptions end a wait for them too."""
    section = config.servers.pools[pool]
    folder = section.model or config.model.path
    hf, tokenizer = read_config(folder), load_tokenizer(folder)
    servers = FrozenServers(
        config.servers,
        pool=pool,
        folder=RunDir(config.run.dir).servers,
        model=Path(folder),
        decode=decoder(tokenizer),
        served=Model(int(hf["vocab_size"]), stop_ids(tokenizer, folder)),
        replicas=replicas,
    )
    if like is not None:
        servers.interrupted = lambda: like.interrupted()
    return ModelRespondent(servers, tokenizer, min(section.context, positions(hf)) - SERVER_MARGIN)


def real_vocab(config: Config, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Entries that count under `model.vocab`; None leaves it to the model's config."""
    return len(tokenizer) if config.model.vocab == "tokenizer" else None
