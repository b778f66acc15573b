"""The supervisor: servers are announced when ready, started again when they end, and gone when it goes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_urlvr.rollout.sleep import marker

ROOT = Path(__file__).parents[3]
SUPPORT = ROOT / "tests" / "support"
PATIENCE_S = 120


def wait_for(what: Callable[[], Any]) -> Any:
    """The first true value of `what`."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


class Supervisor:
    """`urlvr rollout serve` on the fake SGLang."""

    def __init__(self, work: Path, *overrides: str, **variables: str) -> None:
        self.run = work / "run"
        self.folder = self.run / "servers"
        model = work / "model"
        model.mkdir(exist_ok=True)
        (model / "config.json").write_text('{"max_position_embeddings": 64}')
        python_path = f"{SUPPORT / 'fake_environment'}:{SUPPORT}"
        settings = [f"model.path={model}", f"run.dir={self.run}", f"servers.pools.policy.python={sys.executable}"]
        settings.append(f"servers.pools.policy.env.PYTHONPATH={python_path}")
        command = [sys.executable, "-m", "megatron_urlvr.cli", "rollout", "serve"]
        command += [str(ROOT / "configs" / "quickstart_sglang.yaml"), *settings, *overrides]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **variables}
        )

    def announced(self) -> dict[str, Any] | None:
        """The only announcement, if it is there."""
        for path in self.folder.glob("*.json"):
            with contextlib.suppress(FileNotFoundError):  # withdrawn in between
                return dict(json.loads(path.read_text()))
        return None

    def child(self) -> int:
        """What the newest server started."""
        [log] = self.folder.glob("*.log")
        return int(re.findall(r"child (\d+)", log.read_text())[-1])

    def end(self) -> tuple[int, str]:
        """Exit code and output."""
        try:
            output, _ = self.process.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.terminate()
            raise
        return self.process.returncode, output


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    supervisor = Supervisor(tmp_path)
    yield supervisor
    if supervisor.process.poll() is None:
        supervisor.process.send_signal(signal.SIGTERM)
    supervisor.end()


@pytest.mark.slow
def test_a_server_that_is_killed_is_started_again_and_announced_anew(supervisor: Supervisor) -> None:
    first = wait_for(supervisor.announced)
    assert first["pool"] == "policy"
    assert first["torch"]
    child = supervisor.child()
    os.kill(first["pid"], signal.SIGKILL)
    second = wait_for(lambda: (now := supervisor.announced()) and now["started"] != first["started"] and now)
    assert second["id"] == first["id"]
    assert not alive(child), "what the dead server had started went with it"


@pytest.mark.slow
def test_a_signal_ends_servers_and_what_they_started_and_nothing_stays_announced(supervisor: Supervisor) -> None:
    server = wait_for(supervisor.announced)
    child = supervisor.child()
    supervisor.process.send_signal(signal.SIGTERM)
    code, _ = supervisor.end()
    assert code == 0
    assert not alive(server["pid"])
    assert not alive(child)
    assert supervisor.announced() is None


@pytest.mark.slow
def test_a_server_that_dies_while_the_trainer_has_its_memory_is_started_again_afterwards(tmp_path: Path) -> None:
    health = ["servers.health_every_s=0.05", "servers.health_timeout_s=0.1", "servers.sync_timeout_s=0.1"]
    supervisor = Supervisor(tmp_path, "servers.transport=disk", "servers.colocated=true", *health)
    first = wait_for(supervisor.announced)
    marker(supervisor.folder).touch()
    [log] = supervisor.folder.glob("*.log")
    os.kill(first["pid"], signal.SIGKILL)
    assert supervisor.process.stdout is not None
    assert any("waits with that" in line for line in supervisor.process.stdout)
    assert supervisor.announced() is None
    assert len(re.findall("child", log.read_text())) == 1, "no other was started"
    marker(supervisor.folder).unlink()
    second = wait_for(supervisor.announced)
    assert second["id"] == first["id"]
    assert second["started"] != first["started"]
    supervisor.process.send_signal(signal.SIGTERM)
    assert supervisor.end()[0] == 0


@pytest.mark.slow
def test_the_end_of_the_run_ends_the_servers(supervisor: Supervisor) -> None:
    wait_for(supervisor.announced)
    (supervisor.run / "DONE").touch()
    code, output = supervisor.end()
    assert code == 0
    assert "is done" in output
    assert supervisor.announced() is None


@pytest.mark.slow
def test_a_server_that_never_starts_ends_the_supervisor_with_the_end_of_its_log(tmp_path: Path) -> None:
    code, output = Supervisor(tmp_path, FAKE_FAILS="1").end()
    assert code == 1
    assert "3 times in a row" in output
    assert "this server never starts" in output


def test_without_a_python_for_the_servers_it_is_said_where_to_set_one(tmp_path: Path) -> None:
    code, output = Supervisor(tmp_path, "servers.pools.policy.python=null", URLVR_SGLANG_PYTHON="").end()
    assert code == 2
    assert "servers.pools.<pool>.python" in output


@pytest.mark.slow
def test_the_key_that_servers_print_is_in_no_log(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path, URLVR_API_KEY="open sesame")
    wait_for(supervisor.announced)
    supervisor.process.send_signal(signal.SIGTERM)
    _, output = supervisor.end()
    [log] = supervisor.folder.glob("*.log")
    assert "api_key='(API key)'" in log.read_text()
    for path in supervisor.run.rglob("*"):
        assert path.is_dir() or b"open sesame" not in path.read_bytes()
    assert "open sesame" not in output


def test_beyond_loopback_a_key_is_needed(tmp_path: Path) -> None:
    code, output = Supervisor(tmp_path, "servers.pools.policy.host=0.0.0.0").end()
    assert code == 2
    assert "URLVR_API_KEY" in output
