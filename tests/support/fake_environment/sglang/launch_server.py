"""`python -m sglang.launch_server` with the fake server behind it, and a child process as the real one has."""

import argparse
import os
import subprocess
import sys
import threading


def main() -> None:
    if os.environ.get("FAKE_FAILS"):
        sys.exit("this server never starts")
    from fake_sglang import DiceModel, FakeServer

    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    arguments, _ = parser.parse_known_args()
    stubborn = "import signal; signal.signal(15, signal.SIG_IGN); signal.pause()"
    child = subprocess.Popen([sys.executable, "-c", stubborn])
    print(f"child {child.pid}", flush=True)
    FakeServer(DiceModel(), port=arguments.port)
    threading.Event().wait()


main()
