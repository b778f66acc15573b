"""The whole config of a training run."""

from .algorithm import AlgorithmSection
from .base import Section
from .data import DataSection
from .eval import EvalSection
from .model import ModelSection
from .monitor import CheckpointSection, MonitorSection
from .optim import OptimSection
from .parallel import ParallelSection
from .reward import RewardSection
from .rollout import RolloutSection
from .run import RunSection


class Config(Section):
    """One training run. `urlvr train FILE [key=value ...]` reads it from YAML."""

    run: RunSection
    model: ModelSection
    data: DataSection
    eval: EvalSection = EvalSection()
    rollout: RolloutSection
    reward: RewardSection
    algorithm: AlgorithmSection = AlgorithmSection()
    optim: OptimSection
    parallel: ParallelSection = ParallelSection()
    checkpoint: CheckpointSection = CheckpointSection()
    monitor: MonitorSection = MonitorSection()
