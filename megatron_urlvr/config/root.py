"""The whole config of a training run."""

from .algorithm import AlgorithmSection, RatioLoss
from .base import Section, rule
from .data import DataSection
from .eval import EvalSection
from .model import ModelSection
from .monitor import CheckpointSection, MonitorSection
from .optim import OptimSection
from .parallel import ParallelSection
from .reward import RewardSection
from .rollout import RolloutSection
from .run import RunSection
from .servers import ServersSection


class Config(Section):
    """One training run. `urlvr train FILE [key=value ...]` reads it from YAML."""

    run: RunSection
    """What this run is called, where it lives, how long it goes on."""
    model: ModelSection
    """The policy's starting weights and numerics."""
    data: DataSection
    """Where prompts and labels come from."""
    eval: EvalSection = EvalSection()
    """Held-out sets and how they are sampled."""
    rollout: RolloutSection
    """How responses are sampled."""
    reward: RewardSection
    """The terms whose weighted sum is the proxy reward."""
    algorithm: AlgorithmSection = AlgorithmSection()
    """From rewards to a loss."""
    optim: OptimSection
    """The optimizer and its schedule."""
    parallel: ParallelSection = ParallelSection()
    """How the policy is laid out over processes."""
    servers: ServersSection = ServersSection()
    """The SGLang servers of `rollout.engine: sglang`."""
    checkpoint: CheckpointSection = CheckpointSection()
    """What is saved to continue from."""
    monitor: MonitorSection = MonitorSection()
    """What a run writes while it goes on."""

    @property
    def keeps_start(self) -> bool:
        """Whether the starting weights are read again: by an evaluation, a penalty, a certainty reward, a provider."""
        kl = self.algorithm.kl
        return (
            self.eval.every > 0
            or (kl.coef > 0 and kl.reference == "start")
            or self.reward.judge == "reference"
            or any(provider.options.get("weights") == "reference" for provider in self.reward.providers.values())
        )

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps taken on one step's rollouts."""
        per_epoch = -(-self.rollout.prompts // (self.algorithm.mini_batch or self.rollout.prompts))
        return per_epoch * self.algorithm.epochs

    @rule("algorithm.mini_batch", "rollout.prompts")
    def _mini_batch(self) -> str | None:
        prompts, mini_batch = self.rollout.prompts, self.algorithm.mini_batch
        if mini_batch is not None and prompts % mini_batch:
            fits = ", ".join(str(size) for size in range(1, prompts + 1) if prompts % size == 0)
            return (
                f"algorithm.mini_batch = {mini_batch} does not divide rollout.prompts = {prompts}: "
                f"the prompts of a step are cut into equal mini-batches; these sizes fit: {fits}"
            )
        return None

    @rule("algorithm.kl.coef", "algorithm.kl.reference", "optim.ema_decay")
    def _ema_reference(self) -> str | None:
        kl = self.algorithm.kl
        if kl.coef > 0 and kl.reference == "ema" and self.optim.ema_decay is None:
            return (
                "algorithm.kl.reference = 'ema' needs optim.ema_decay, which is null: "
                "set a decay such as 0.99, or algorithm.kl.reference=start"
            )
        return None

    @rule("algorithm.loss.name", "algorithm.epochs", "algorithm.mini_batch", "rollout.prompts", "algorithm.correction")
    def _something_to_hold(self) -> str | None:
        algorithm = self.algorithm
        once = algorithm.epochs == 1 and algorithm.mini_batch in (None, self.rollout.prompts)
        if algorithm.loss.name == "kl_cov" and once and algorithm.correction.old_logp == "recomputed":
            return (
                "algorithm.loss.name = 'kl_cov' with one optimizer step for a step's samples: the policy has not moved "
                "from the one that sampled, and there is nothing to hold; set algorithm.mini_batch or algorithm.epochs"
            )
        return None

    @rule("algorithm.entropy_scaling", "reward.statistics", "reward.judge")
    def _own_entropies(self) -> str | None:
        if self.algorithm.entropy_scaling and (self.reward.statistics == "servers" or self.reward.judge != "policy"):
            return (
                "algorithm.entropy_scaling = true takes the policy's own entropies from the trainer's scoring pass: "
                "set reward.statistics=trainer and reward.judge=policy"
            )
        return None

    @rule("reward.judge", "optim.ema_decay")
    def _ema_judge(self) -> str | None:
        if self.reward.judge == "ema" and self.optim.ema_decay is None:
            return (
                "reward.judge = 'ema' needs optim.ema_decay, which is null: set a decay such as 0.99, or "
                "reward.judge=reference"
            )
        return None

    @rule("reward.providers", "rollout.engine", "optim.ema_decay", "servers.pools")
    def _who_is_asked(self) -> str | None:
        for label, provider in self.reward.providers.items():
            weights, place = provider.options.get("weights"), f"reward.providers.{label}.weights"
            if weights == "ema" and self.optim.ema_decay is None:
                return f"{place} = 'ema' needs optim.ema_decay, which is null: set a decay such as 0.99"
            if weights in ("reference", "ema") and self.rollout.engine == "sglang":
                return (
                    f"{place} = {weights!r} with rollout.engine = 'sglang': servers hold the policy's weights or their "
                    "own; set weights=servers and give the pool's model, or weights=policy"
                )
            taught = provider.options.get("cotrain") is not None  # then the recording holds the verdicts
            if weights == "policy" and self.rollout.engine == "replay" and not taught:
                return f"{place} = 'policy' with rollout.engine = 'replay': a recording answers no other prompts"
            pool = provider.options.get("pool")
            if weights == "servers" and pool not in self.servers.pools:
                return (
                    f"{place} = 'servers' needs servers.pools.{pool}, and there is {', '.join(self.servers.pools)}: "
                    f"give the pool, with the model it serves, or set reward.providers.{label}.pool"
                )
        return None

    @rule("reward.providers", "rollout.temperature", "algorithm.loss.name", "algorithm.entropy_scaling")
    def _judge_is_trained(self) -> str | None:
        for label, provider in self.reward.providers.items():
            if provider.options.get("cotrain") is None:
                continue
            place, temperature = f"reward.providers.{label}", provider.options.get("temperature")
            if temperature != self.rollout.temperature:
                return (
                    f"{place}.cotrain with {place}.temperature = {temperature}: what is trained on is sampled at the "
                    f"temperature of the policy; set {place}.temperature={self.rollout.temperature}"
                )
            if not isinstance(self.algorithm.loss, RatioLoss):
                return (
                    f"{place}.cotrain with algorithm.loss.name = {self.algorithm.loss.name!r}, which trains on no "
                    "reward: choose a policy gradient such as ppo_clip, or leave cotrain out"
                )
            if self.algorithm.entropy_scaling:
                return (
                    f"{place}.cotrain with algorithm.entropy_scaling = true: verdicts are not scored, so that their "
                    "entropies are not known; leave one of the two out"
                )
        return None

    @rule("algorithm.advantage", "rollout.n_votes", "rollout.n_train", "run.rollout_only")
    def _group_of_one(self) -> str | None:
        if self.rollout.trained > 1 or self.run.rollout_only:
            return None
        setting = "n_votes" if self.rollout.n_train is None else "n_train"
        return (
            f"rollout.{setting} = 1: {self.algorithm.advantage} compares the responses of one prompt with each other, "
            "and there is nothing to compare a single one with; train on at least 2"
        )

    @rule("rollout.engine", "model.vocab")
    def _servers_sample_everything(self) -> str | None:
        if self.rollout.engine == "sglang" and self.model.vocab == "tokenizer":
            return (
                "model.vocab = 'tokenizer' with rollout.engine = 'sglang': servers sample from all entries of the "
                "model's vocabulary, and statistics must cover the same; set model.vocab=config"
            )
        return None

    @rule("reward.statistics", "reward.judge", "reward.temperature", "rollout.engine", "rollout.temperature")
    def _statistics_of_servers(self) -> str | None:
        if self.reward.statistics != "servers":
            return None
        if self.rollout.engine != "sglang":
            return (
                f"reward.statistics = 'servers' with rollout.engine = {self.rollout.engine!r}, which has no servers: "
                "set reward.statistics=trainer, or rollout.engine=sglang"
            )
        if self.reward.judge != "policy":
            return (
                f"reward.statistics = 'servers' with reward.judge = {self.reward.judge!r}: servers measure with the "
                "weights they sample with; set reward.statistics=trainer, or reward.judge=policy"
            )
        if self.reward.temperature not in ("rollout", self.rollout.temperature):
            return (
                f"reward.statistics = 'servers' with reward.temperature = {self.reward.temperature}: servers measure "
                f"at the temperature they sample at, {self.rollout.temperature}; set reward.temperature=rollout, or "
                "reward.statistics=trainer"
            )
        return None

    @rule("rollout.max_staleness", "algorithm.correction.old_logp", "algorithm.correction.method", "run.rollout_only")
    def _age_is_corrected(self) -> str | None:
        correction = self.algorithm.correction
        untouched = correction.old_logp == "recomputed" and correction.method == "none"
        if self.rollout.max_staleness and untouched and not self.run.rollout_only:
            return (
                f"rollout.max_staleness = {self.rollout.max_staleness} trains on tokens of older weights, and "
                "algorithm.correction takes no notice of it: set algorithm.correction.old_logp=rollout (the loss's "
                "ratio is then to the weights that sampled each token), or a method such as "
                "algorithm.correction.method=truncate"
            )
        return None

    @rule("rollout.early_voting", "reward.terms")
    def _early_voting_for_votes(self) -> str | None:
        others = sorted({term.name for term in self.reward.terms.values()} - {"majority_vote"})
        if self.rollout.early_voting and others:
            return (
                f"rollout.early_voting with the reward {', '.join(others)}: votes that were given up are missing from "
                "it; it is for majority_vote alone"
            )
        return None

    @rule("optim.offload", "parallel.distributed_optimizer")
    def _offloaded_shards(self) -> str | None:
        if self.optim.offload and not self.parallel.distributed_optimizer:
            return (
                "optim.offload = true with parallel.distributed_optimizer = false: what would travel is this rank's "
                "share of the optimizer; set parallel.distributed_optimizer=true"
            )
        return None

    @rule("servers.colocated", "rollout.engine", "rollout.max_staleness", "run.rollout_only", "reward.providers")
    def _servers_in_turns(self) -> str | None:
        if not self.servers.colocated:
            return None
        if self.rollout.engine != "sglang":
            return f"servers.colocated = true with rollout.engine = {self.rollout.engine!r}, which has no servers"
        if self.rollout.max_staleness:
            return (
                f"servers.colocated = true with rollout.max_staleness = {self.rollout.max_staleness}: nothing can be "
                "generated while the policy trains on the same GPUs; set rollout.max_staleness=0, or give servers GPUs "
                "of their own"
            )
        if self.run.rollout_only:
            return "servers.colocated = true with run.rollout_only = true: nothing trains that memory could be for"
        for label, provider in self.reward.providers.items():
            if provider.options.get("weights") == "policy":
                return (
                    f"servers.colocated = true with reward.providers.{label}.weights = 'policy': the servers sleep "
                    "when providers ask; set weights=servers and a pool on GPUs of its own"
                )
        return None

    @rule("run.rollout_only", "rollout.engine")
    def _recording_a_replay(self) -> str | None:
        if self.run.rollout_only and self.rollout.engine == "replay":
            return (
                "run.rollout_only = true with rollout.engine = 'replay' would record what is already recorded: "
                "record with engine: embedded, or train on the replay"
            )
        return None

    @rule("eval.every", "rollout.engine")
    def _evaluating_a_replay(self) -> str | None:
        if self.eval.every and self.rollout.engine == "replay":
            return (
                f"eval.every = {self.eval.every} with rollout.engine = 'replay': a recording holds no responses to "
                "held-out prompts; set eval.every=0, and measure a checkpoint with `urlvr eval`"
            )
        return None
