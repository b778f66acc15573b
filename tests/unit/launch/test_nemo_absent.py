"""Without NeMo-Run: everything else works, and who asks for it reads what to install."""

import subprocess
import sys

import pytest

from megatron_urlvr.exit_codes import UnusableInput


def test_no_command_imports_it_before_it_is_asked_for():
    code = "import sys, megatron_urlvr.cli, megatron_urlvr.launch.slurm; print('nemo_run' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_asking_for_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nemo_run", None)
    monkeypatch.delitem(sys.modules, "megatron_urlvr.launch.nemo", raising=False)
    with pytest.raises(UnusableInput, match=r"pip install 'megatron-urlvr\[nemo\]'"):
        import megatron_urlvr.launch.nemo  # noqa: F401
