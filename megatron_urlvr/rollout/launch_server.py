"""The command line and environment of one SGLang server (0.5.23)."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.servers import PoolSection
from ..exit_codes import UnusableInput

PYTHON_VARIABLE = "URLVR_SGLANG_PYTHON"
ASK_S = 300
"""Longest that a Python may take to say what it has; importing torch is slow on a busy machine."""
QUESTION = """
import json, torch
cuda = torch.cuda.is_available()
nccl = ".".join(map(str, torch.cuda.nccl.version())) if cuda else ""
import importlib.metadata as m
try: sglang = m.version("sglang")
except m.PackageNotFoundError: sglang = ""
print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda or "", "nccl": nccl, "sglang": sglang,
                  "device": "cuda" if cuda else "cpu"}))
"""


@dataclass(frozen=True)
class Environment:
    """What the servers' Python has."""

    python: str
    device: str
    torch: str
    cuda: str
    nccl: str


def examine(pool: PoolSection, variables: Mapping[str, str]) -> Environment:
    """Ask the servers' Python what it has. UnusableInput when there is none, or none with SGLang."""
    python = pool.python or variables.get(PYTHON_VARIABLE)
    if not python:
        raise UnusableInput(
            f"no Python for the servers: set servers.pools.<pool>.python, or the variable {PYTHON_VARIABLE}, to the one"
            " of SGLang's own environment (`make sglang-cpu` makes one for a CPU and prints it)."
        )
    try:
        found = subprocess.run(
            [python, "-c", QUESTION], capture_output=True, text=True, timeout=ASK_S, env={**variables, **pool.env}
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnusableInput(f"the servers' Python {python} cannot be used: {error}.") from error
    if found.returncode:
        last = (found.stderr.strip().splitlines() or ["no message"])[-1]
        raise UnusableInput(f"the servers' Python {python} has no working torch: {last}.")
    said = json.loads(found.stdout.strip().splitlines()[-1])
    if not said["sglang"]:
        raise UnusableInput(f"the servers' Python {python} has no sglang: install servers/requirements-gpu.txt there.")
    device = said["device"] if pool.device == "auto" else pool.device
    return Environment(python, device, said["torch"], said["cuda"], said["nccl"])


def server_command(
    pool: PoolSection,
    environment: Environment,
    *,
    model: str,
    port: int,
    key_file: Path | None,
    context: int | None,
    index: int = 0,
    colocated: bool = False,
    dtype: str = "auto",
) -> list[str]:
    """The arguments that start a server. `key_file`: YAML file with the API key, which must not stand in a command
    line; `context`: the model's own limit, where it has one; `index`: the server's number on this host, each of which
    takes the next `tp` of the GPUs that are visible; `colocated`: it must be able to give their memory back; `dtype`:
    what it computes in on a GPU. SGLang's `auto` is float16 for a folder of float32."""
    command = [environment.python, "-m", "sglang.launch_server", "--model-path", model]
    command += ["--host", pool.host, "--port", str(port), "--tp-size", str(pool.tp)]
    command += ["--context-length", str(min(pool.context, context or pool.context))]
    # Token ids in and out: without tokenizers servers start faster, and no tokenizer is "fixed" behind our back.
    command += ["--skip-tokenizer-init"]
    if environment.device == "cpu":
        tokens = pool.concurrency * min(pool.context, context or pool.context)
        command += ["--device", "cpu", "--attention-backend", "torch_native", "--dtype", "float32"]
        command += ["--max-total-tokens", str(min(tokens, 65536)), "--max-running-requests", str(pool.concurrency)]
        command += ["--mem-fraction-static", "0.05"]
        command += ["--cuda-graph-backend-decode", "disabled", "--cuda-graph-backend-prefill", "disabled"]
    else:
        command += ["--dtype", dtype, "--mem-fraction-static", str(pool.mem_fraction)]
        command += ["--max-running-requests", str(pool.concurrency), "--base-gpu-id", str(index * pool.tp)]
        if colocated:
            command += ["--enable-memory-saver"]
    if key_file is not None:
        command += ["--config", str(key_file)]
    return command + list(pool.args)


def server_environment(pool: PoolSection, environment: Environment, variables: Mapping[str, str]) -> dict[str, str]:
    """Variables of a server: the caller's own but for those that would make it part of a training job."""
    alien = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH", "VIRTUAL_ENV"}
    # A server's three processes import a thousand modules each: compiled once, they start in half the time.
    alien |= {"PYTHONDONTWRITEBYTECODE"}
    kept: dict[str, Any] = {name: value for name, value in variables.items() if name not in alien}
    kept |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if environment.device == "cpu":
        kept |= {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": variables.get("OMP_NUM_THREADS", "1")}
    return kept | pool.env


def model_context(model: str) -> int | None:
    """`max_position_embeddings` of a Hugging Face folder. UnusableInput when it has no readable config."""
    path = Path(model) / "config.json"
    try:
        limit = json.loads(path.read_text(encoding="utf-8")).get("max_position_embeddings")
    except (OSError, ValueError) as error:
        raise UnusableInput(f"servers cannot serve {model!r}: {path} cannot be read ({error}).") from error
    return int(limit) if limit is not None else None
