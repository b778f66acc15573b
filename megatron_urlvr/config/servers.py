"""`servers`: the SGLang servers that rollouts come from, and how weights reach them."""

from typing import Literal

from pydantic import Field

from .addresses import address_problem
from .base import Section, rule

POLICY = "policy"
"""The pool whose weights follow the policy's."""


class PoolSection(Section):
    urls: list[str] = Field(default_factory=list)
    """Servers that run already. Empty: those that `urlvr rollout serve` announces in the run's folder."""
    router: str | None = None
    """A router (sglang-router, say) that requests for responses go through. Everything else goes to the servers
    themselves, and so does a request that failed on the way. None: servers are asked directly."""
    count: int = Field(default=1, ge=1)
    """Servers that `urlvr rollout serve` starts."""
    model: str | None = None
    """Hugging Face folder to serve. None: `model.path`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What the servers compute on. `auto`: CUDA where their torch has a device."""
    tp: int = Field(default=1, ge=1)
    """Tensor-parallel size of each server."""
    context: int = Field(default=8192, ge=2)
    """Longest prompt and response together, in tokens; the model's own limit where that is lower."""
    mem_fraction: float = Field(default=0.85, gt=0, lt=1)
    """Share of the device memory for weights and KV cache. On a CPU the cache is sized by `concurrency` alone."""
    concurrency: int = Field(default=256, ge=1)
    """Most requests that one server works on at once, over all replicas of the trainer."""
    python: str | None = None
    """Python of the environment that SGLang is installed in. None: the variable URLVR_SGLANG_PYTHON."""
    host: str = "127.0.0.1"
    """Address that servers listen on. Anything but loopback needs an API key."""
    args: list[str] = Field(default_factory=list)
    """Further arguments of `sglang.launch_server`."""
    env: dict[str, str] = Field(default_factory=dict)
    """Further environment variables of the servers. Kept in the run's folder with the config: no secrets here."""


class ServersSection(Section):
    pools: dict[str, PoolSection] = Field(default_factory=lambda: {POLICY: PoolSection()})
    """Servers by what they are for. `policy` follows the policy's weights; others keep the ones they started with."""
    colocated: bool = False
    """Servers run on the trainer's own GPUs, and hand the memory of their weights and cache over while the policy
    trains. Needs `transport: disk`, and every host of the trainer to run its servers (`urlvr rollout serve`)."""
    transport: Literal["group", "disk"] = "group"
    """How weights travel. `group`: broadcast over a process group (NCCL, or gloo on a CPU); `disk`: servers read the
    snapshot. With both, a server that comes back in mid-step reads the snapshot."""
    pause: Literal["retract", "in_place"] = "retract"
    """What servers do with responses under way while weights are updated. `retract`: compute them again with the new
    weights, and go on; `in_place`: go on with what they had computed with the old ones, which is quicker and mixes the
    two inside a response's cache."""
    snapshot_dir: str | None = None
    """Folder that holds the newest weights; every server must see it. None: `servers/weights` in the run's folder."""
    verify: bool = False
    """After each update compare checksums of what servers hold with the policy's (servers on a CPU), or with each
    other's (on CUDA, where they hash otherwise). Takes a second a GB and more."""
    bucket_mb: int = Field(default=512, ge=1)
    """Tensors are sent in buckets of so many MB."""
    sync_timeout_s: float = Field(default=120, gt=0)
    """Longest that one bucket, or the loading of a snapshot, may take."""
    timeout_s: float = Field(default=600, gt=0)
    """Longest that one response may take; after that it is asked for elsewhere."""
    health_every_s: float = Field(default=10, gt=0)
    """A server that has not answered for so long is asked for its health."""
    health_timeout_s: float = Field(default=30, gt=0)
    """Longest that the answer about its health may take."""
    wait_s: float = Field(default=600, ge=0)
    """With no server left the run waits so long for one to come back, then saves and exits with code 5."""
    start_timeout_s: float = Field(default=900, gt=0)
    """Longest that a server may take from its start until it generates; reading 70B of weights takes minutes."""
    check_groups: int = Field(default=1, ge=0)
    """Groups of each replica and step that the trainer scores for comparison, where it does not score all of them."""
    stats_alarm: float | None = Field(default=0.1, gt=0)
    """Mean difference of the servers' token statistics from the trainer's above which a line is printed and
    `rollout/stats_alarm` is 1. None: no alarm."""
    attempts: int = Field(default=16, ge=1)
    """Requests for one sample before the run gives up: no server could answer it."""
    hosts: list[str] = Field(default_factory=lambda: ["127.0.0.1", "localhost", "::1"])
    """Hosts that announced servers may be on. The trainer sends its weights there."""
    api_key_env: str = "URLVR_API_KEY"
    """Environment variable that holds the servers' API key. The key itself is never written anywhere."""

    @rule("pools")
    def _policy_pool(self) -> str | None:
        if POLICY not in self.pools:
            return f"pools holds {sorted(self.pools) or 'nothing'}: a pool named {POLICY!r} is needed"
        return None

    @rule("pools")
    def _urls(self) -> str | None:
        for name, pool in self.pools.items():
            for url in pool.urls:
                if problem := address_problem(url):
                    return f"pools.{name}.urls holds {url!r}: {problem}"
            if pool.router is not None and (problem := address_problem(pool.router)):
                return f"pools.{name}.router = {pool.router!r}: {problem}"
            if pool.router is not None and name != POLICY:
                return f"pools.{name}.router = {pool.router!r}: only the pool {POLICY!r} is asked through a router"
        return None

    @rule("colocated", "transport", "pause", "pools")
    def _taking_turns(self) -> str | None:
        if not self.colocated or POLICY not in self.pools:
            return None
        if self.transport != "disk":
            return (
                "colocated = true with transport = 'group': NCCL refuses two processes on one GPU; set transport=disk, "
                "and snapshot_dir to a folder in memory that every server sees, such as /dev/shm"
            )
        if self.pause != "retract":
            return (
                "colocated = true with pause = 'in_place': servers drop their cache when they sleep, and no response is"
                " under way then; set pause=retract"
            )
        if self.policy.router is not None:
            return (
                f"colocated = true with pools.{POLICY}.router = {self.policy.router!r}: a router does not know that "
                "servers sleep; leave it out"
            )
        return None

    @property
    def policy(self) -> PoolSection:
        """The pool that rollouts come from."""
        return self.pools[POLICY]
