"""The CUDA C++: it compiles for the architectures we name, its per-thread arithmetic is right when run on the host, and
its entry points take what Python passes.

Without nvcc the per-thread functions are compiled by g++ against stand-ins for CUDA's headers (`host_headers`). What
needs a GPU (shuffles, clusters, launches, speed) is in `tests/gpu`.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from urlvr_kernels import OUTPUTS, cuda_build, cuda_ops, reference, rowstate
from urlvr_kernels.cuda_ops import DTYPES, CudaOps
from urlvr_kernels.rowstate import TARGET, Slopes, Wanted, statistics

needs_nvcc = pytest.mark.skipif(
    cuda_build.find_nvcc() is None, reason="nvcc is not here: that they compile for GPUs is unchecked"
)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The per-thread functions, compiled for the host."""
    here = Path(__file__).parent
    nvcc, gcc = cuda_build.find_nvcc(), shutil.which("g++")
    if nvcc is not None:
        compiler = [nvcc, "-x", "c++", "-Xcompiler", "-fPIC"]
    elif gcc is not None:
        compiler = [gcc, "-fPIC", f"-I{here / 'host_headers'}"]
    else:
        pytest.skip("neither nvcc nor g++ is here: the arithmetic of the CUDA sources is unchecked")
    made = tmp_path_factory.mktemp("host") / "host.so"
    include = cuda_build.sources()[0].parent
    code = here / "csrc_on_host.cpp"
    subprocess.run([*compiler, "-std=c++17", "-O1", "-shared", f"-I{include}", "-o", made, code], check=True)
    return ctypes.CDLL(str(made))


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


@needs_nvcc
def test_the_sources_compile_for_sm_80_and_sm_90_and_the_result_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("URLVR_KERNELS_CACHE", str(tmp_path))
    library = cuda_build.build(["80", "90"])
    assert library.parent == tmp_path
    built = library.stat().st_mtime_ns
    assert cuda_build.build(["90", "80"]) == library
    assert library.stat().st_mtime_ns == built
    loaded = ctypes.CDLL(str(library))
    assert loaded.urlvr_abi_version() == cuda_build.ABI_VERSION
    for name in ("urlvr_row_state", "urlvr_dlogits", "urlvr_merge"):
        assert getattr(loaded, name)
    if not torch.cuda.is_available():  # no driver: nothing it could run
        with pytest.raises(cuda_build.CudaBuildError, match=r"^backend: 'cuda' was built with toolkit"):
            cuda_build.check(loaded)
    monkeypatch.setattr(cuda_build, "ABI_VERSION", 999)
    with pytest.raises(cuda_build.CudaBuildError, match="ABI version 1, this package needs 999"):
        cuda_build.check(loaded)


class Said:
    """What pytest's terminal reporter would be told, were a run's reports `stats`."""

    def __init__(self, **stats: list[SimpleNamespace]) -> None:
        self.stats, self.lines = stats, list[str]()

    def write_line(self, line: str) -> None:
        self.lines.append(line)


def test_a_runs_last_lines_say_whether_the_sources_were_compiled(pytestconfig):
    here = Path(__file__).parent / "conftest.py"
    (plugin,) = (p for p in pytestconfig.pluginmanager.get_plugins() if getattr(p, "__file__", "") == str(here))
    assert plugin.COMPILES in globals()
    compiles = f"tests/kernels/test_cuda_sources.py::{plugin.COMPILES}"
    other = SimpleNamespace(nodeid="tests/kernels/test_x.py::test_y", longrepr=None)
    skipped = SimpleNamespace(
        nodeid=compiles, longrepr=("test_cuda_sources.py", 29, f"Skipped: {needs_nvcc.kwargs['reason']}")
    )
    for said, lines in (
        (Said(passed=[other]), []),
        (Said(passed=[other, SimpleNamespace(nodeid=compiles, longrepr=None)]), ["compiled for sm_80 and sm_90."]),
        (Said(skipped=[skipped]), ["not compiled, nvcc is not here: that they compile for GPUs is unchecked."]),
        (Said(failed=[SimpleNamespace(nodeid=compiles, longrepr="boom")]), ["compiling them failed, see above."]),
    ):
        plugin.pytest_terminal_summary(said)
        assert said.lines == [f"CUDA sources: {line}" for line in lines]


def test_without_nvcc_the_backend_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_build, "find_nvcc", lambda: None)
    with pytest.raises(cuda_build.CudaBuildError, match=r"^backend: 'cuda' needs nvcc"):
        cuda_build.build(["90"])


SOURCE = "\n".join(path.read_text() for path in cuda_build.sources())


def parameters(name: str) -> list[type]:
    """What the entry point called `name` takes, as ctypes calls it."""
    (text,) = re.findall(rf"\nint {name}\(([^)]*)\) {{", SOURCE)
    numbers = {"int": ctypes.c_int, "int64_t": ctypes.c_int64, "float": ctypes.c_float}
    types = (" ".join(part.split()[:-1]) for part in text.replace("*", "* ").split(","))
    return [ctypes.c_void_p if "*" in one else numbers[one] for one in types]


def test_the_entry_points_take_exactly_what_python_passes(monkeypatch):
    seen: dict[str, list[list[type]]] = {}

    def entry(name: str):
        def call(*arguments: object) -> int:
            seen.setdefault(name, []).append([type(argument) for argument in arguments])
            return 0

        return call

    ops = object.__new__(CudaOps)
    ops._library = SimpleNamespace(**{f"urlvr_{name}": entry(name) for name in ("row_state", "dlogits", "merge")})
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    logits, target, row = torch.zeros(2, 20_000), torch.zeros(2, dtype=torch.int64), torch.zeros(2)
    for ops._clusters in (False, True):
        for tau in (None, 0.5, row):
            more = {"target": target, "first": 0, "inv_tau": tau}
            ops.row_state(logits, torch.zeros(8, 2), Wanted(True, True, True, True, True), **more)
            ops.dlogits(logits, logits, Slopes(row, row, row, row, row), **more)
            ops.dlogits(logits, logits, Slopes(row, row, None, None, None), **more | {"target": None})
    assert set(seen) == {"row_state", "dlogits", "merge"}  # without clusters, the split rows' states are merged
    for name, calls in seen.items():
        assert all(types == parameters(f"urlvr_{name}") for types in calls), name


def test_python_and_the_sources_number_fields_flags_and_types_alike():
    (version,) = re.findall(r"kAbiVersion = (\d+);", SOURCE)
    assert int(version) == cuda_build.ABI_VERSION
    (flags,) = re.findall(r"enum Flag \{([^}]*)\}", SOURCE)
    for name, value in re.findall(r"(\w+) = (\d+)", flags):
        assert getattr(cuda_ops, name) == int(value), name
    assert len(re.findall("=", flags)) == 7
    (fields,) = re.findall(r"enum Field \{([^}]*)\}", SOURCE)
    names = [name.split("=")[0].strip() for name in fields.split(",")]
    assert [getattr(rowstate, name) for name in names] == list(range(rowstate.FIELDS))
    cases = dict(re.findall(r"case (\d): return choose_row_state<(\w+)>", SOURCE))
    types = {"float": torch.float32, "__nv_bfloat16": torch.bfloat16, "__half": torch.float16}
    assert {types[name]: int(number) for number, name in cases.items()} == DTYPES


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("columns", "start", "splits", "threads"), [(1, 0, 1, 32), (7, 3, 1, 32), (1003, 1, 3, 32), (4096, 8, 2, 64)]
)
def test_threads_together_read_every_column_once_wherever_the_row_begins(host, dtype, columns, start, splits, threads):
    row = (4 * torch.randn(start + columns, generator=torch.Generator().manual_seed(columns))).to(dtype)[start:]
    state = torch.empty(8, 1)
    host.host_row_state(pointer(row), DTYPES[dtype], columns, splits, threads, ctypes.c_float(0.7), pointer(state))
    target = torch.tensor([columns // 2])
    expected = reference.logits_stats(row.double()[None], target, temperature=1 / 0.7, outputs=OUTPUTS)
    state[TARGET] = 0.7 * row[target].float() - state[0]
    found = statistics(state, OUTPUTS, columns)[2]
    for name in OUTPUTS:
        assert torch.allclose(found[name].double(), getattr(expected, name).double(), rtol=1e-5, atol=1e-5), name


def test_masked_columns_and_ties_are_counted_right(host):
    row = torch.full((300,), -torch.inf)
    row[[40, 41, 200]] = 5.0
    row[7] = 4.0
    state = torch.empty(8, 1)
    host.host_row_state(pointer(row), 0, 300, 2, 32, ctypes.c_float(1.0), pointer(state))
    m, s, a, u, _, n, second, best = state[:, 0].tolist()
    assert (m, second, best, n, u) == (5.0, 5.0, 40.0, 300.0, -torch.inf)
    weight = torch.tensor(-1.0).exp().item()
    assert s == pytest.approx(3 + weight)
    assert a == pytest.approx(-weight)


SLOPES = [
    (*types, *starts, inplace)
    for types in ((0, 0), (0, 1), (1, 1), (2, 2))
    for starts, inplace in (((0, 0), True), ((3, 3), False), ((3, 0), False), ((5, 5), True))
    if types[0] == types[1] or not inplace
]


@pytest.mark.parametrize(("dtype", "out_dtype", "start", "out_start", "inplace"), SLOPES)
def test_threads_together_write_every_slope_once(host, dtype, out_dtype, start, out_start, inplace):
    types = {number: dtype for dtype, number in DTYPES.items()}
    columns, local = 517, 300
    row = (2 * torch.randn(start + columns, generator=torch.Generator().manual_seed(1))).to(types[dtype])[start:]
    row[11] = -torch.inf
    z = 0.8 * row.double()
    q = z - z.logsumexp(0)
    alpha, beta, label, uniform = 0.3, -0.5, 1.5, -0.01
    expected = 0.8 * (torch.where(q.exp() > 0, q.exp() * (alpha + beta * q), 0.0) + uniform)
    expected[local] += 0.8 * label
    out = row if inplace else torch.full((out_start + columns + 8,), 77.0, dtype=types[out_dtype])[out_start:]
    scalars = torch.tensor([0.8, z.logsumexp(0).item(), alpha, beta, label, uniform])
    host.host_slopes(pointer(scalars), local, pointer(row), dtype, pointer(out), out_dtype, columns, 256, 32)
    eps = torch.finfo(types[out_dtype]).eps
    assert torch.allclose(out[:columns].double(), expected, rtol=2 * eps, atol=1e-5 if eps < 1e-3 else 1e-4)
    assert (out[columns:] == 77.0).all()
