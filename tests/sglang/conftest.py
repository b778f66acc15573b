"""One real SGLang server for all tests of this folder, started as a user starts it: by `urlvr rollout serve`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from server_contract import VOCAB, Target
from supervised import ROOT, Served
from tiny_models import write_qwen2


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    work = tmp_path_factory.mktemp("sglang")
    folder = write_qwen2(work / "model", vocab_size=VOCAB)
    run = work / "run"
    run.mkdir()
    python = os.environ.get("URLVR_SGLANG_PYTHON")
    assert python, "URLVR_SGLANG_PYTHON is not set: run these tests with `make test-sglang`"
    command = [sys.executable, "-m", "megatron_urlvr.cli", "rollout", "serve"]
    command += [str(ROOT / "configs" / "quickstart_sglang.yaml"), f"model.path={folder}", f"run.dir={run}"]
    with (run / "serve.log").open("w") as log:
        supervisor = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True)
    served = Served(folder, run, supervisor)
    try:
        served.wait()
        yield served
    finally:
        supervisor.send_signal(signal.SIGTERM)
        supervisor.wait(timeout=60)


@pytest.fixture
def sglang_server(served: Served) -> Target:
    return Target(served.wait()["url"], served.folder)
