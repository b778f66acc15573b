"""A plan as text and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .hardware import GIB, Assumptions
from .memory import RankMemory, kept_per_token
from .plan import Plan
from .providers import Answered

COLUMNS = (
    *("pp rank", "params", "weights", "grads", "optim"),
    *("activ.", "working", "head", "score", "sync", "reserve", "peak"),
)


RING = "passed around a ring (Transformer Engine's attention)"


def as_text(plan: Plan) -> str:
    """The plan in sections, for a terminal of 100 columns."""
    sections = (_head, _memory, _server, _times, _providers, _sync, _assumptions, _verdict)
    return "\n".join(line for section in sections for line in section(plan)) + "\n"


def _head(plan: Plan) -> Iterator[str]:
    config, crew, parallel = plan.config, plan.crew, plan.config.parallel
    active = f", {plan.active:,} of them active a token" if plan.policy.mixture.experts else ""
    yield f"{config.run.name}: {config.model.path}, {plan.parameters:,} parameters{active}"
    serving = f", {crew.serving} serve ({crew.servers} x tp {crew.server_tp})" if crew.serving else ""
    if crew.shared:
        serving = f", and serve in turns ({crew.servers} x tp {crew.server_tp})"
    yield f"{crew.gpus} x {plan.gpu.name}: {crew.trainers} train{serving}"
    more = f" x vpp {parallel.vpp}" if parallel.vpp > 1 else ""
    more += f" x cp {parallel.cp}" if parallel.cp > 1 else ""
    spread = f"ep {parallel.ep} of dp{' x cp' if parallel.cp > 1 else ''}, " if parallel.ep > 1 else ""
    yield (
        f"layout: dp {plan.policy.dp} x tp {parallel.tp} x pp {parallel.pp}{more}, {spread}"
        f"{'sequence parallel, ' if parallel.sequence_parallel else ''}recompute {config.model.recompute}, "
        f"{str(plan.policy.dtype).removeprefix('torch.')}"
    )
    work = plan.work
    yield (
        f"a step: {work.votes} responses of {work.response:.0f} tokens (longest {work.longest_response}), "
        f"{work.trained} trained on in {work.updates} update(s) of {plan.times.microbatches} micro-batches a replica"
    )
    if lessons := sum(rows.count for rows in work.lessons) * work.epochs:
        yield f"  beside them {lessons:.0f} verdicts of co-trained judges"


def _memory(plan: Plan) -> Iterator[str]:
    yield ""
    cp = plan.config.parallel.cp
    spread = f" over {cp} ranks" if cp > 1 else ""
    yield f"Trainer, GiB a GPU (of {plan.gpu.memory / GIB:.1f}; micro-batches of {plan.tokens} tokens{spread})"
    columns = (
        "pp rank",
        "params",
        "weights",
        "grads",
        "optim",
        "activ.",
        "working",
        "head",
        "score",
        "sync",
        "reserve",
    )
    yield "".join(f"{name:>{_width(name)}}" for name in (*columns, "peak"))
    for rank in plan.ranks:
        shard = rank.shard
        ranks = shard.pp_ranks
        name = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
        cells = [name, f"{shard.parameters / 1e9:.3f}B"]
        sizes = (shard.weights, shard.gradients, shard.optimizer, rank.activations, rank.working, rank.head)
        cells += [f"{size / GIB:.1f}" for size in (*sizes, rank.score, rank.sync, rank.reserve, rank.peak)]
        yield "".join(f"{cell:>{_width(head)}}" for cell, head in zip(cells, COLUMNS, strict=True))
    if plan.policy.offloads:
        yield "peak = weights + grads + reserve + the largest of update (activ. + working + head), score, sync, optim"
    else:
        yield "peak = weights + grads + optim + reserve + the largest of update (activ. + working + head), score, sync"
    modes = [f"{mode} {kept_per_token(plan.policy, mode) / 1024:.1f}" for mode in ("none", "selective", "full")]
    yield f"activations, KiB a token and layer by recompute: {', '.join(modes)}"
    if cp > 1:
        how = "gathered (our own attention, for shared prefixes)" if plan.policy.gathers_context else RING
        yield f"keys and values of other context-parallel ranks: {how}"
    if plan.policy.mixture.experts:
        yield _experts(plan)
    if plan.host_bytes:
        state = ", optimizer" if plan.policy.offloads else ""
        yield f"host memory of each rank for reference, moving average{state}: {plan.host_bytes / GIB:.1f} GiB"


def _experts(plan: Plan) -> str:
    mixture, policy = plan.policy.mixture, plan.policy
    return (
        f"experts: {mixture.experts // policy.parallel.ep} of {mixture.experts} in each layer of a rank, a token goes "
        f"to {mixture.chosen}; planned for {policy.copies:g} copies of each, dispatched all-to-all"
    )


def _width(name: str) -> int:
    return max(9, len(name) + 1)


def _server(plan: Plan) -> Iterator[str]:
    server, pool = plan.server, plan.config.servers.policy
    if server is None:
        return
    yield ""
    yield f"Servers, GiB a GPU (mem_fraction {pool.mem_fraction:g})"
    yield (
        f"weights {server.weights / GIB:.1f}, KV cache {server.kv_cache / GIB:.1f} ({server.tokens:,} tokens a "
        f"server), left to SGLang {server.other / GIB:.1f}"
    )
    fleet = plan.fleet
    if fleet is not None and fleet.mixture.experts and plan.times.generate is not None:
        running = plan.times.generate.running
        yield (
            f"experts are {server.experts / server.weights:.0%} of the weights; a decode step of {running} responses "
            f"reads {fleet.mixture.touched(running):.0%} of them, if every token chooses evenly and by itself"
        )
    if plan.crew.shared:
        peak, asleep = max(rank.peak for rank in plan.ranks) / GIB, plan.assumptions.sleeping_server_gib
        stays = f"{server.trainer / GIB:.1f} of the trainer stay on each GPU"
        yield f"while they generate, {stays}: weights, optim, reserve"
        yield f"while the policy trains, {asleep:.1f} of a sleeping server stay beside the trainer's peak of {peak:.1f}"


def _times(plan: Plan) -> Iterator[str]:
    times = plan.times
    yield ""
    yield "A step, seconds (an estimate from the assumptions below)"
    if times.generate is not None:
        made = times.generate
        yield (
            f"  generate {made.seconds:9.1f}   {made.running} at once on each of {made.servers} servers, "
            f"{made.tokens_per_second:,.0f} tokens/s a GPU"
        )
    if times.asked:
        yield f"  ask      {times.ask:9.1f}   providers, below"
    passes = [*plan.work.scoring, *plan.work.rescoring]
    passes += [f"weights swapped in {times.swaps:.1f}"] if times.swaps else []
    yield f"  score    {times.score:9.1f}   {'; '.join(passes) or 'no reward or loss needs a pass'}"
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in times.after_backward.items())
    yield f"  train    {times.train:9.1f}   bubble {times.bubble:.0%}, MFU {times.train_mfu:.0%}; {parts}"
    yield f"  sync     {times.sync:9.1f}"
    how = "generation beside training" if times.overlapped else "one after the other"
    yield f"  total    {times.total:9.1f}   {how}; {times.model_flops / 1e15:,.1f} PFLOP to score and train"
    steps = plan.config.run.steps
    run = f"{plan.gpu_hours * steps:,.0f} for run.steps = {steps}, evaluations aside"
    yield f"  GPU hours{plan.gpu_hours:9.2f}   a step on {plan.crew.gpus} GPUs; {run}"


def _providers(plan: Plan) -> Iterator[str]:
    """What each provider costs."""
    if not plan.times.asked:
        return
    yield ""
    yield "Providers, one after the other (tokens are means)"
    for each in plan.times.asked:
        yield f"  {each.asked.label} ({each.asked.name}): {_asked(plan, each)}"


def _asked(plan: Plan, each: Answered) -> str:
    asked, job = each.asked, each.asked.job
    if not asked.who:
        return "asks no model; its own work is not modelled"
    if job is None:
        return f"asks {asked.who}, for how much is not known"
    once = ", each once in a run" if asked.request is not None and asked.request.once else ""
    said = (
        f"asks {asked.who} {job.prompts:.0f} prompts of {job.prompt:.0f} tokens{once}, {job.responses:.0f} answers of "
        f"{job.response:.0f} (longest {job.longest}): "
    )
    said += "time not modelled" if each.seconds is None else f"ask {each.seconds:.1f} s"
    if asked.lessons is not None and plan.work.lessons:
        rows = asked.lessons.rows
        tokens = sum(rows.count * rows.length for rows in plan.work.lessons)
        share = plan.times.lessons * rows.count * rows.length / tokens
        said += f", train {share:.1f} s ({rows.count * plan.work.epochs:.0f} verdicts)"
    if each.fleet is not None:
        said += f"; {each.fleet.servers} servers x tp {each.fleet.tp}, on GPUs beside the {plan.crew.gpus}"
    return said


def _sync(plan: Plan) -> Iterator[str]:
    sync = plan.sync
    if sync is None:
        return
    config = plan.config.servers
    yield ""
    yield (
        f"Weight sync: {sync.bytes / 1e9:.1f} GB in {sync.buckets} buckets of {sync.bucket_bytes >> 20} MB "
        f"(largest {sync.largest_bucket / 1e6:.0f} MB), transport {config.transport}"
    )
    for group in _alike(plan):
        yield f"  {group}"
    yield "  " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in sync.seconds.items() if seconds)
    written = sync.bytes / 1e9 / plan.assumptions.disk_gb_s
    if config.transport == "group":
        yield f"  the snapshot on disk takes {written:.0f} s, beside the next step"


def _alike(plan: Plan) -> Iterator[str]:
    """Stages that send the like, a line for each kind."""
    assert plan.sync is not None
    kinds: dict[tuple[int, int], list[Any]] = {}
    for stage in plan.sync.stages:
        kinds.setdefault((stage.tensors, stage.bytes), []).append(stage)
    for (tensors, size), stages in kinds.items():
        which = ", ".join(str(stage.stage) for stage in stages)
        buckets = ", ".join(str(stage.buckets) for stage in stages)
        yield f"stage {which}: {tensors} tensors, {size / 1e9:.1f} GB, buckets {buckets}"


def _assumptions(plan: Plan) -> Iterator[str]:
    gpu = plan.gpu
    yield ""
    yield f"{gpu.name}: {gpu.source}"
    yield (
        f"  {gpu.tflops:g} TFLOP/s dense bfloat16, {gpu.memory_gb_s:g} GB/s memory, {gpu.nvlink_gb_s:g} GB/s NVLink, "
        f"{gpu.network_gb_s:g} GB/s network in one direction"
    )
    yield "Assumptions (--assume name=value)"
    for name, field in Assumptions.model_fields.items():
        meaning = " ".join((field.description or "").split())
        yield f"  {name} = {getattr(plan.assumptions, name):g}: {meaning}"


def _verdict(plan: Plan) -> Iterator[str]:
    if plan.notes:
        yield ""
        yield "Notes"
        yield from (f"  - {note}" for note in plan.notes)
    if plan.problems:
        yield ""
        yield "Does not fit:"
        yield from (f"  - {problem}" for problem in plan.problems)


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values; sizes in bytes, times in seconds."""
    times, crew = plan.times, plan.crew
    return {
        "run": plan.config.run.name,
        "model": {"path": plan.config.model.path, "parameters": plan.parameters, "active": plan.active},
        "gpu": plan.gpu.name,
        "gpus": {"total": crew.gpus, "train": crew.trainers, "serve": crew.serving, "servers": crew.servers},
        "in_turns": crew.shared,
        "layout": {"dp": plan.policy.dp} | plan.config.parallel.model_dump(mode="json", exclude={"dp"}),
        "microbatch_tokens": plan.tokens,
        "ranks": [_rank_json(rank) for rank in plan.ranks],
        "server": None if plan.server is None else {**vars(plan.server), "cache_tokens": plan.server.tokens},
        "host_bytes": plan.host_bytes,
        "seconds": {
            "generate": None if times.generate is None else times.generate.seconds,
            "ask": times.ask,
            "score": times.score,
            "train": times.train,
            "sync": times.sync,
            "total": times.total,
        },
        "gpu_hours": {"step": plan.gpu_hours, "run": plan.gpu_hours * plan.config.run.steps},
        "providers": [_provider_json(each) for each in times.asked],
        "microbatches": times.microbatches,
        "bubble": times.bubble,
        "train_mfu": times.train_mfu,
        "model_flops": times.model_flops,
        "sync": None
        if plan.sync is None
        else {"bytes": plan.sync.bytes, "buckets": plan.sync.buckets, "stages": [vars(s) for s in plan.sync.stages]},
        "assumptions": plan.assumptions.model_dump(),
        "notes": plan.notes,
        "problems": plan.problems,
    }


def _rank_json(rank: RankMemory) -> dict[str, Any]:
    own = {name: value for name, value in vars(rank).items() if name != "shard"}
    return {**vars(rank.shard), **own, "update": rank.update, "peak": rank.peak}


def _provider_json(each: Answered) -> dict[str, Any]:
    asked, job = each.asked, each.asked.job
    return {
        "label": asked.label,
        "name": asked.name,
        "asks": asked.who or None,
        "job": None if job is None else vars(job),
        "lessons": None if asked.lessons is None else vars(asked.lessons.rows),
        "seconds": each.seconds,
    }
