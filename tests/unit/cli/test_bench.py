"""`urlvr bench` runs a script of the source tree, and says so where there is none."""

import json

import pytest
import urlvr_kernels

from megatron_urlvr.commands.bench import bench_kernels
from megatron_urlvr.exit_codes import UnusableInput


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(urlvr_kernels, "__file__", str(tmp_path / "urlvr_kernels" / "__init__.py"))
    return tmp_path / "benchmarks" / "bench.py"


def test_every_argument_reaches_the_script_and_its_exit_code_comes_back(elsewhere, tmp_path):
    elsewhere.parent.mkdir()
    written = tmp_path / "arguments.json"
    elsewhere.write_text(f"import json, sys; json.dump(sys.argv[1:], open({str(written)!r}, 'w')); sys.exit(7)")
    assert bench_kernels(["--shape", "8,4,16", "--help"]) == 7
    assert json.loads(written.read_text()) == ["--shape", "8,4,16", "--help"]


def test_an_installation_without_the_source_tree_says_where_the_benchmarks_are(elsewhere):
    with pytest.raises(UnusableInput, match="source tree"):
        bench_kernels([])
