"""The config of `urlvr mcs`: base policies whose Model Collapse Steps are measured and compared."""

from __future__ import annotations

from pydantic import Field

from .base import Section, rule
from .study import BaseSpec, StudyConfig, StudyRun

SUPERVISED = "supervised"


class McsConfig(Section):
    name: str = Field(min_length=1)
    """Name in logs."""
    dir: str = Field(min_length=1)
    """Folder of the runs, `mcs.json` and the report."""
    title: str
    """Heading of report and figure."""
    config: str
    """The run config, relative to this file, of label-free training on votes (`majority_vote`)."""
    bases: dict[str, BaseSpec] = Field(default_factory=dict)
    """Base policies to pretrain, as in a study."""
    policies: dict[str, str] = Field(min_length=1)
    """Policies to compare, by name: `<base>/<snapshot>` of `bases`, or a Hugging Face folder."""
    policy_overrides: dict[str, list[str]] = Field(default_factory=dict)
    """Overrides for single policies, by name, such as a prompt template for one whose tokenizer has none."""
    settings: dict[str, list[str]] = Field(default={"default": []}, min_length=1)
    """Overrides by name: the paper compares a default setting and an aggressive one (`algorithm.mini_batch=1`)."""
    supervised: list[str] = Field(default_factory=list)
    """Overrides that make the run with labels, whose gain is predicted; empty: no such runs."""
    seeds: list[int] = Field(default_factory=list)
    """Repeat everything for each seed (pretraining, data and RL)."""
    jobs: int = Field(default=1, ge=1)
    """Runs at once."""
    threshold: float = Field(default=0.01, gt=0, lt=1)
    """The step counts at which the metric first is below this."""
    sweep: list[float] = Field(default_factory=lambda: [0.005, 0.01, 0.02, 0.05, 0.1, 0.2])
    """Thresholds whose steps are listed too."""
    smoothing: int = Field(default=1, ge=1)
    """Mean over so many steps before the comparison; 1 is the paper's rule, which is measured in any case."""
    persistence: int = Field(default=1, ge=1)
    """So many steps in a row must be below; 1 is the paper's rule, which is measured in any case."""
    eval_set: str = "held_out"
    """Evaluation set of the gains."""

    @rule("settings")
    def _settings_are_named(self) -> str | None:
        if SUPERVISED in self.settings:
            return f"settings.{SUPERVISED}: this name is that of the runs with labels; choose another"
        return None

    @rule("policies", "policy_overrides")
    def _policies_are_there(self) -> str | None:
        if unknown := [name for name in self.policy_overrides if name not in self.policies]:
            return f"policy_overrides.{unknown[0]}: there is no such policy; policies are {', '.join(self.policies)}"
        return None

    def study(self) -> StudyConfig:
        """The study that makes the runs: `<setting>.<policy>` and `supervised.<policy>`."""
        settings = {**self.settings, **({SUPERVISED: self.supervised} if self.supervised else {})}
        runs = {
            f"{setting}.{policy}": self._run(setting, policy, source, overrides)
            for setting, overrides in settings.items()
            for policy, source in self.policies.items()
        }
        return StudyConfig(
            name=self.name,
            dir=self.dir,
            title=self.title,
            bases=self.bases,
            runs=runs,
            jobs=self.jobs,
            seeds=self.seeds,
        )

    def _run(self, setting: str, policy: str, source: str, overrides: list[str]) -> StudyRun:
        made = source.partition("/")[0] in self.bases
        model = [] if made else [f"model.path={source}"]
        return StudyRun(
            config=self.config,
            base=source if made else None,
            overrides=[*self.policy_overrides.get(policy, []), *overrides, *model],
            label=f"{policy}, {setting}",
        )
