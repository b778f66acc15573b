"""`run`: what this run is called, where it lives, how long it goes on."""

from typing import Literal

from pydantic import Field

from .base import Section


class RunSection(Section):
    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run in reports and logs."""
    dir: str = Field(min_length=1)
    """Folder that holds everything the run writes."""
    steps: int = Field(ge=0)
    """Number of training steps; one step is one batch of rollouts."""
    seed: int = Field(ge=0, lt=2**31)
    """Varies data order and sampling. The same seed gives the same run, bit for bit, on the same layout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA when a device is there."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` continues from the newest intact checkpoint in `dir`; `never` refuses a folder that has one."""
    branch_from: str | None = Field(default=None, pattern=r"^.+@\d+$")
    """`RUN@step`: go on from that run's checkpoint, with these settings (another reward, say) and its history so far;
    data, model and seed must be its own. None: from `model.path`."""
    rollout_only: bool = False
    """Record rollouts of the unchanged policy and train nothing."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of each process."""
