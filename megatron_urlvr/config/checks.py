"""What a valid config may still be wrong about: the model, the tokenizer and the processes that it meets."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from .data import TableSource
from .root import Config


def check(
    config: Config,
    *,
    world_size: int,
    hf_config: Mapping[str, Any],
    tokenizer_size: int | None,
    device: Literal["cpu", "cuda"],
) -> list[str]:
    """All that keeps this run from starting, a sentence each; empty when nothing does.

    `world_size`: processes started. `hf_config`: the model's `config.json`. `tokenizer_size`: its number of entries,
    added tokens included; None without a tokenizer. `device`: what torch has here.
    """
    return [
        *_device(config, device),
        *_world(config, world_size),
        *_shards(config, hf_config),
        *_vocabulary(config, hf_config, tokenizer_size),
        *_context(config, hf_config),
        *_servers_context(config, hf_config),
        *_signals(config),
        *_server_statistics(config, hf_config),
    ]


def cautions(config: Config) -> list[str]:
    """What may be meant and is more likely a mistake, a sentence each."""
    return [*_all_warm_up(config), *_replayed_as_own(config)]


def _all_warm_up(config: Config) -> Iterator[str]:
    warm_up, updates = config.optim.warmup_steps, config.run.steps * config.updates_per_step
    if config.run.rollout_only or not 0 < updates <= warm_up:
        return
    yield (
        f"optim.warmup_steps = {warm_up} lasts as long as the run: run.steps = {config.run.steps} makes {updates} "
        f"optimizer steps, and optim.lr = {config.optim.lr:g} is not reached before the last, if at all."
    )


def _replayed_as_own(config: Config) -> Iterator[str]:
    correction = config.algorithm.correction
    if config.rollout.engine == "replay" and correction.old_logp == "recomputed" and correction.method == "none":
        yield (
            "rollout.engine = 'replay' with algorithm.correction as it is takes recorded responses for the "
            "policy's own, with a ratio of 1 before a step's first update: set algorithm.correction.old_logp=rollout, "
            "unless the very weights that they train have sampled them."
        )


def _device(config: Config, device: str) -> Iterator[str]:
    if config.run.device == "cuda" and device == "cpu":
        yield "run.device = 'cuda', but torch sees no CUDA device: set run.device=auto; `urlvr doctor` says more."
    if config.model.fp8 != "none" and device == "cpu":
        yield f"model.fp8 = {config.model.fp8!r} needs Transformer Engine on a GPU: set model.fp8=none here."
    if config.run.device == "cpu" and device == "cuda":
        yield (
            "run.device = 'cpu' on a machine with CUDA devices: hide them with CUDA_VISIBLE_DEVICES= in front of the "
            "command, or set run.device=auto."
        )


def _world(config: Config, world_size: int) -> Iterator[str]:
    parallel, prompts = config.parallel, config.rollout.prompts
    one = parallel.model_ranks
    layout = f"parallel.tp = {parallel.tp} x parallel.pp = {parallel.pp}"
    if parallel.cp > 1:
        layout += f" x parallel.cp = {parallel.cp}"
    if world_size % one:
        yield (
            f"{layout} makes {one} processes a replica, which does not divide the {world_size} that were started: "
            f"start a multiple of {one}, or change the layout."
        )
        return
    replicas = world_size // one
    if parallel.dp not in ("auto", replicas):
        yield (
            f"{layout} x parallel.dp = {parallel.dp} is {one * int(parallel.dp)} processes, but {world_size} were "
            f"started: set parallel.dp={replicas} or auto, or start {one * int(parallel.dp)}."
        )
    if (replicas * parallel.cp) % parallel.ep:
        yield (
            f"parallel.ep = {parallel.ep} does not divide the {replicas} data-parallel x {parallel.cp} "
            "context-parallel ranks over which experts are spread: choose a divisor of their product."
        )
    if prompts % replicas:
        yield (
            f"rollout.prompts = {prompts} cannot be shared evenly by {replicas} data-parallel replicas: "
            f"make it a multiple of {replicas}."
        )
    mini_batch = config.algorithm.mini_batch
    if mini_batch is not None and mini_batch % replicas:
        yield (
            f"algorithm.mini_batch = {mini_batch} cannot be shared evenly by {replicas} data-parallel replicas: "
            f"make it a multiple of {replicas} that divides rollout.prompts = {prompts}."
        )


def _shards(config: Config, hf_config: Mapping[str, Any]) -> Iterator[str]:
    tp, pp = config.parallel.tp, config.parallel.pp
    heads = hf_config.get("num_attention_heads")
    for what, count in (
        ("attention heads", heads),
        ("key-value heads", hf_config.get("num_key_value_heads", heads)),
        ("feed-forward channels", hf_config.get("intermediate_size")),
    ):
        if count is not None and count % tp:
            yield _uneven("parallel.tp", tp, what, count, config)
    layers, stages = hf_config.get("num_hidden_layers"), config.parallel.stage_layers
    if stages is not None:
        if layers is not None and sum(stages) != layers:
            yield (
                f"parallel.stage_layers = {stages} adds up to {sum(stages)}, not to the {layers} layers of "
                f"model.path = {config.model.path!r}: give each stage its number, {layers} in all."
            )
    elif layers is not None and layers % pp:
        yield _uneven("parallel.pp", pp, "layers", layers, config)
    elif layers is not None and (layers // pp) % config.parallel.vpp:
        yield _uneven("parallel.vpp", config.parallel.vpp, "layers of each pipeline rank", layers // pp, config)
    ep, experts = config.parallel.ep, hf_config.get("num_experts") or hf_config.get("num_local_experts") or 0
    if ep > 1 and not experts:
        yield (
            f"parallel.ep = {ep} spreads experts, but model.path = {config.model.path!r} is no mixture of experts: set "
            "parallel.ep=1."
        )
    elif experts % ep:
        yield _uneven("parallel.ep", ep, "experts", experts, config)
    if tp > 1 and "moe_intermediate_size" in hf_config and not config.parallel.sequence_parallel:
        yield (
            f"parallel.tp = {tp} shards a mixture of experts, which Megatron trains with sequence parallelism alone: "
            "set parallel.sequence_parallel=true, or parallel.tp=1."
        )


def _uneven(setting: str, size: int, what: str, count: int, config: Config) -> str:
    fits = [str(number) for number in range(1, count + 1) if count % number == 0][:8]
    more = " and more" if fits[-1] != str(count) else ""
    return (
        f"{setting} = {size} does not divide the {count} {what} of model.path = {config.model.path!r}: "
        f"these sizes do: {', '.join(fits)}{more}."
    )


def _vocabulary(config: Config, hf_config: Mapping[str, Any], tokenizer_size: int | None) -> Iterator[str]:
    width, path = hf_config.get("vocab_size"), config.model.path
    if width is None:
        return
    if config.parallel.tp > width:
        yield f"parallel.tp = {config.parallel.tp} exceeds the {width} vocabulary entries of model.path = {path!r}."
    if tokenizer_size is not None and tokenizer_size > width:
        yield (
            f"model.path = {path!r}: its tokenizer has {tokenizer_size} entries, but its config.json says vocab_size = "
            f"{width}: tokens from {width} on have no embedding. Use the tokenizer that the model was made with, or "
            "resize the model's embeddings and save it again."
        )


def _context(config: Config, hf_config: Mapping[str, Any]) -> Iterator[str]:
    context, prompt = hf_config.get("max_position_embeddings"), config.data.max_prompt_tokens
    if context is None:
        return
    lengths = {"rollout.max_new_tokens": config.rollout.max_new_tokens}
    for name, options in config.eval.sets.items():
        if options.max_new_tokens is not None:
            lengths[f"eval.sets.{name}.max_new_tokens"] = options.max_new_tokens
    for setting, length in lengths.items():
        if prompt + length > context:
            yield (
                f"data.max_prompt_tokens = {prompt} and {setting} = {length} add up to {prompt + length}, more than "
                f"the {context} positions of model.path = {config.model.path!r}: lower one of the two."
            )


SERVER_MARGIN = 2
"""Positions that SGLang 0.5.23 keeps back: beyond them it shortens responses without a word."""


def _servers_context(config: Config, hf_config: Mapping[str, Any]) -> Iterator[str]:
    if config.rollout.engine != "sglang":
        return
    own = hf_config.get("max_position_embeddings", config.servers.policy.context)
    context = min(config.servers.policy.context, own)
    asked = {"rollout": config.rollout.max_new_tokens} | {
        f"eval.sets.{name}": options.max_new_tokens or 0 for name, options in config.eval.sets.items()
    }
    section, new = max(asked.items(), key=lambda item: item[1])
    needed = config.data.max_prompt_tokens + new + SERVER_MARGIN
    if needed > context:
        yield (
            f"data.max_prompt_tokens = {config.data.max_prompt_tokens} and {section}.max_new_tokens = {new} need "
            f"{needed} positions on a server, {SERVER_MARGIN} of them its own, but servers.pools.policy.context and "
            f"the model allow {context}: lower one of the two, or raise the context if it is the lower."
        )


def _signals(config: Config) -> Iterator[str]:
    # Late: rewards depend on torch and on this package.
    from megatron_urlvr.rewards import build_terms, get_provider, missing_signals
    from megatron_urlvr.rewards.base import ANSWER, LABEL, PERMUTED_LABEL
    from megatron_urlvr.rewards.spans import SPAN_SIGNALS
    from megatron_urlvr.types import STATISTICS

    terms = build_terms(config.reward, advantage=config.algorithm.advantage, seed=config.run.seed)
    classes = {name: get_provider(p.name) for name, p in config.reward.providers.items()}
    made = {name: classes[name](classes[name].Options(**p.options)) for name, p in config.reward.providers.items()}
    offered = {name: provider.provides for name, provider in made.items()}
    read = {name: provider.needs for name, provider in made.items()}
    everything = frozenset().union(STATISTICS, {ANSWER, LABEL, PERMUTED_LABEL}, SPAN_SIGNALS, *offered.values())
    read_here = terms.needs.union(*read.values())
    if not read_here & STATISTICS and not config.algorithm.entropy_scaling:
        reward = config.reward
        for setting, value, plain in (
            ("judge", reward.judge, "policy"),
            ("temperature", reward.temperature, "rollout"),
        ):
            if value != plain:
                yield (
                    f"reward.{setting} = {value!r} is about token statistics, and no reward of this run is made of "
                    "any: leave it out, or choose a reward that needs them (`urlvr rewards`)."
                )
    for sentence in missing_signals(terms, everything):
        yield f"{sentence}; name a provider of it under reward.providers."
    for label, signals in read.items():
        for signal in sorted(signals - everything | signals & {LABEL, PERMUTED_LABEL}):
            yield (
                f"reward.providers.{label} needs the signal {signal!r}, which nothing in this run provides to "
                "providers: name a provider of it under reward.providers (labels are never theirs)."
            )
    for label, signals in offered.items():
        if not signals & read_here:
            yield (
                f"reward.providers.{label} provides {', '.join(sorted(signals))}, which no reward of this run needs: "
                "leave it out, or choose a reward that reads it."
            )
        if twice := [other for other in offered if other < label and offered[other] & signals]:
            yield (
                f"reward.providers.{twice[0]} and reward.providers.{label} both provide "
                f"{', '.join(sorted(offered[twice[0]] & signals))}: leave one of them out."
            )
    source = config.data.train
    if terms.supervised and isinstance(source, TableSource) and source.label_field is None:
        supervised = ", ".join(sorted(term.reward.name for term in terms.terms if term.reward.supervised))
        yield (
            f"data.train.label_field = null, but the reward {supervised} reads labels: name the key that holds them, "
            "or choose a reward that needs none."
        )


def _server_statistics(config: Config, hf_config: Mapping[str, Any]) -> Iterator[str]:
    if config.reward.statistics != "servers" or config.rollout.engine != "sglang":
        return
    # Late: they depend on torch and on this package.
    from megatron_urlvr.rollout.plugin import unavailable
    from megatron_urlvr.rollout.supervisor import server_statistics

    if missing := unavailable(server_statistics(config)):
        yield (
            f"reward.statistics = 'servers', but the plug-in of the servers computes no {', no '.join(missing)}, which "
            "the reward terms need: set reward.statistics=trainer."
        )
    served, width = config.servers.policy.model, hf_config.get("vocab_size")
    if served is not None and (theirs := _vocabulary_of(served)) not in (None, width):
        yield (
            f"reward.statistics = 'servers': servers.pools.policy.model = {served!r} has a vocabulary of {theirs}, "
            f"model.path = {config.model.path!r} one of {width}; statistics over other vocabularies are other "
            "statistics: serve model.path, or set reward.statistics=trainer."
        )


def _vocabulary_of(folder: str) -> int | None:
    """`vocab_size` of a Hugging Face folder; None where it cannot be read here (servers may see other disks)."""
    try:
        return int(json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
