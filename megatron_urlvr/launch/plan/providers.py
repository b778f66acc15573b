"""What providers of signals ask of whom in a step, in tokens and in seconds.

Their `fetch` waits for its answers, so that one follows the other, after the responses and before the rewards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...config.parallel import ParallelSection
from ...config.root import Config
from ...exit_codes import UnusableInput
from ...policy.hf.families import family_of
from ...policy.hf.folder import read_config
from ...rewards import get_provider
from ...rewards.providers import Provider, Request
from .generate import Fleet, Job, fleet_of, generation
from .hardware import GPU, Assumptions
from .stream import stream_of
from .workload import WEIGHTS, Lessons, Rows

EMBEDDED_POLICY = "the embedded policy"


@dataclass(frozen=True)
class Asked:
    """One provider's share of a step."""

    label: str
    """Key in `reward.providers`."""
    name: str
    who: str
    """Who answers, in words; empty where no model is asked."""
    of_policy: bool = False
    """The policy's servers answer, which generate nothing else meanwhile."""
    pool: str | None = None
    """The pool of servers that answers otherwise."""
    request: Request | None = None
    """About one group; None where nothing is known of it."""
    job: Job | None = None
    """In a whole step."""
    lessons: Lessons | None = None
    """What the policy is trained on beside its responses."""


def asked_of(config: Config, assumptions: Assumptions) -> list[Asked]:
    """What each provider of a run asks for in a step, in the config's order."""
    found = []
    for label, section in config.reward.providers.items():
        cls = get_provider(section.name)
        pool = section.options.get("pool")
        found.append(_asked(label, cls(cls.Options(**section.options)), pool, config, assumptions))
    return found


def _asked(label: str, provider: Provider[Any], pool: str | None, config: Config, assumptions: Assumptions) -> Asked:
    rollout, whose = config.rollout, provider.asks
    if whose is None:
        return Asked(label, provider.name, "")
    of_policy = whose == "policy" and rollout.engine == "sglang"
    if whose != "servers":
        pool = None
    if pool is not None:
        who = f"servers of the pool {pool}"
    else:
        own = "the policy's servers" if of_policy else EMBEDDED_POLICY
        who = f"an embedded copy of the {WEIGHTS[whose]}" if whose in WEIGHTS else own
    prompt = assumptions.mean_prompt * config.data.max_prompt_tokens
    request = provider.request(rollout.n_votes, prompt, assumptions.mean_response * rollout.max_new_tokens)
    if request is None:
        return Asked(label, provider.name, who, of_policy, pool)
    mean = request.tokens + len(request.text) / assumptions.characters_per_token
    answer = assumptions.mean_response * request.max_new_tokens
    prompts = rollout.sampled * request.prompts
    job = Job(prompts, prompts * request.samples, mean, answer, request.max_new_tokens)
    lessons = _lessons(provider, job, config, assumptions) if provider.teaches else None
    return Asked(label, provider.name, who, of_policy, pool, request, job, lessons)


def _lessons(provider: Provider[Any], job: Job, config: Config, assumptions: Assumptions) -> Lessons:
    """The longest is a verdict on the longest response; what its judge cannot read is not asked about."""
    rollout = config.rollout
    request = provider.request(rollout.n_votes, config.data.max_prompt_tokens, rollout.max_new_tokens)
    assert request is not None
    longest = int(request.tokens + len(request.text) / assumptions.characters_per_token) + request.max_new_tokens
    if rollout.engine == "sglang":
        longest = min(longest, config.servers.policy.context)
    count = rollout.prompts * request.prompts * request.samples * assumptions.taught_share
    return Lessons(Rows(count, job.prompt, job.response), longest - 1)


@dataclass(frozen=True)
class Answered:
    """A provider's share of a step with its time."""

    asked: Asked
    seconds: float | None
    """None where it is not modelled: the embedded engine, a folder that cannot be read here, an unknown provider."""
    fleet: Fleet | None = None
    """The servers of another pool, on GPUs beside the planned ones."""


def answered(asked: Asked, config: Config, policy: Fleet | None, gpu: GPU, assumptions: Assumptions) -> Answered:
    """`asked` with the seconds that `policy`, the policy's servers, or its own pool's take for it."""
    if not asked.who:
        return Answered(asked, 0.0)
    fleet = policy if asked.of_policy else _fleet_of_pool(asked.pool, config, gpu)
    if fleet is None or asked.job is None:
        return Answered(asked, None, fleet if asked.pool else None)
    made = generation(fleet, asked.job, gpu, assumptions)
    return Answered(asked, None if made is None else made.seconds, fleet if asked.pool else None)


def _fleet_of_pool(name: str | None, config: Config, gpu: GPU) -> Fleet | None:
    """The servers of a pool, in bfloat16, as many as it names or one host starts; None where its model's config.json is
    not here or not of a known family."""
    if name is None:
        return None
    pool = config.servers.pools[name]
    folder = pool.model or config.model.path
    try:
        hf = read_config(folder)
        family = family_of(hf, folder)
    except UnusableInput:
        return None
    parameters = stream_of(hf, family, ParallelSection()).numel
    return fleet_of(hf, pool, gpu, servers=len(pool.urls) or pool.count, parameters=parameters, itemsize=2)
