"""Stands in for NeMo-Run, which is not in the tests' environment: what `launch/nemo.py` uses of it, and notes instead
of jobs. `make test-slurm` uses the real one."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


class Executor(SimpleNamespace):
    """An executor, of whatever fields it is given."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**{"launcher": None, "env_vars": {}, **fields})


class LocalExecutor(Executor):
    """This machine."""


class SlurmExecutor(Executor):
    """A cluster."""


class Config:
    """A class and what to call it with."""

    def __init__(self, made: Any, **arguments: Any) -> None:
        self.made, self.arguments = made, arguments

    def __class_getitem__(cls, item: Any) -> Any:
        return cls


class Experiment:
    """Notes what it is given: (tasks, executors)."""

    def __init__(self, title: str) -> None:
        self.added: list[tuple[Any, Any]] = []

    def __enter__(self) -> Experiment:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def add(self, task: Any, *, executor: Any, name: str) -> None:
        self.added.append((task, executor))


def build(config: Any) -> Any:
    """What the config describes, and what it is given likewise."""
    if not isinstance(config, Config):
        return config
    return config.made(**{name: build(value) for name, value in config.arguments.items()})


def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put it in NeMo-Run's place, and return `megatron_urlvr.launch.nemo` on top of it."""
    fake, fiddle = ModuleType("nemo_run"), ModuleType("fiddle")
    fields = SimpleNamespace
    own = {
        "Executor": Executor,
        "LocalExecutor": LocalExecutor,
        "SlurmExecutor": SlurmExecutor,
        "LocalTunnel": fields,
        "PatternPackager": fields,
        "Script": fields,
        "Config": Config,
        "Experiment": Experiment,
        "cli": SimpleNamespace(factory=lambda function: function),
    }
    vars(fake).update(own)
    vars(fiddle).update(build=build)
    monkeypatch.setitem(sys.modules, "nemo_run", fake)
    monkeypatch.setitem(sys.modules, "fiddle", fiddle)
    # Registered before it is imported, so that nothing on top of the stand-in outlives the test.
    import megatron_urlvr.launch as package

    name = "megatron_urlvr.launch.nemo"
    monkeypatch.setattr(package, "nemo", None, raising=False)
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    del sys.modules[name]
    return importlib.import_module(name)
