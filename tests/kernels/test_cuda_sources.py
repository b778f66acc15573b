"""The CUDA C++: it compiles for the architectures we name, and its per-thread arithmetic is right when run on the host.

What needs a GPU (shuffles, clusters, launches, speed) is in `tests/gpu`.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch
from urlvr_kernels import OUTPUTS, cuda_build, reference
from urlvr_kernels.cuda_ops import DTYPES
from urlvr_kernels.rowstate import TARGET, statistics

needs_nvcc = pytest.mark.skipif(
    cuda_build.find_nvcc() is None, reason="nvcc is not here: the CUDA sources are unchecked"
)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The per-thread functions, compiled for the host."""
    nvcc = cuda_build.find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc is not here, nor its headers")
    made = tmp_path_factory.mktemp("host") / "host.so"
    code = Path(__file__).with_name("csrc_on_host.cpp")
    include = cuda_build.sources()[0].parent
    subprocess.run(
        [nvcc, "-x", "c++", "-std=c++17", "-O1", "-shared", "-Xcompiler", "-fPIC", f"-I{include}", "-o", made, code],
        check=True,
    )
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


def test_without_nvcc_the_backend_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_build, "find_nvcc", lambda: None)
    with pytest.raises(cuda_build.CudaBuildError, match=r"^backend: 'cuda' needs nvcc"):
        cuda_build.build(["90"])


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
