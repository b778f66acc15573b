"""`python -m sglang.launch_server` with the fake server behind it, and a child process as the real one has."""

import argparse
import os
import subprocess
import sys
import threading
from pathlib import Path

import yaml


def main() -> None:
    if os.environ.get("FAKE_FAILS"):
        sys.exit("this server never starts")
    from fake_models import DiceModel, TransformersModel
    from fake_sglang import FakeServer

    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--model-path", type=Path)
    parser.add_argument("--config", type=Path)
    arguments, _ = parser.parse_known_args()
    key = None if arguments.config is None else yaml.safe_load(arguments.config.read_text())["api-key"]
    print(f"server_args={vars(arguments)}, api_key={key!r}", flush=True)  # as SGLang does
    model = TransformersModel(arguments.model_path) if os.environ.get("FAKE_GENERATES") else DiceModel()
    stubborn = "import signal; signal.signal(15, signal.SIG_IGN); signal.pause()"
    child = subprocess.Popen([sys.executable, "-c", stubborn])
    print(f"child {child.pid}", flush=True)
    FakeServer(model, host=arguments.host, port=arguments.port, key=key)
    threading.Event().wait()


main()
