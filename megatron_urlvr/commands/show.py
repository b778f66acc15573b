"""`urlvr config show`: a config as it will be used, or what every setting means."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_urlvr.config.docs import documented_yaml
from megatron_urlvr.config.loader import load_config, model_of, to_yaml
from megatron_urlvr.config.root import Config
from megatron_urlvr.exit_codes import UnusableInput


def show(file: Path | None, overrides: Sequence[str], *, docs: bool) -> str:
    """The resolved YAML of `file`, or with `docs` the documented settings of its kind of config (training, without a
    file). UnusableInput where the config cannot be used, or for `docs` with overrides."""
    if docs and overrides:
        raise UnusableInput(f"--docs says what settings mean; it goes without overrides ({overrides[0]}).")
    if docs:
        return documented_yaml(model_of(file) if file is not None else Config)
    if file is None:
        raise UnusableInput("give the config to show, such as configs/quickstart.yaml, or --docs for all settings.")
    return to_yaml(load_config(file, overrides, model_of(file)))
