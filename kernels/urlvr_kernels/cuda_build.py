"""Builds the CUDA kernels with nvcc, when they are first asked for or ahead of time, and loads them.

    python -m urlvr_kernels.cuda_build --arch 80 --arch 90      # ahead, on a machine without a GPU too

The library has plain C entry points and links the CUDA runtime statically: it knows neither PyTorch's nor Python's
ABI. It is kept in `$URLVR_KERNELS_CACHE` (default `~/.cache/urlvr_kernels`) under a name made of its sources, the
compiler's version and the architectures, so that environments never load each other's builds.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

ABI_VERSION = 1
"""Must equal `kAbiVersion` of the sources: the arguments of the entry points."""
FLAGS = ("-O3", "-std=c++17", "--expt-relaxed-constexpr", "-lineinfo", "-shared", "-Xcompiler", "-fPIC")


class CudaBuildError(RuntimeError):
    """The CUDA kernels cannot be built or loaded here; the message says why and what to do."""


def sources() -> list[Path]:
    """The CUDA sources: beside the package in a checkout, inside it where it was installed."""
    package = Path(__file__).parent
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "urlvr_kernels.cu").exists():
            return sorted(path for path in folder.iterdir() if path.suffix in (".cu", ".cuh"))
    raise CudaBuildError(
        "backend: 'cuda' needs the sources csrc/urlvr_kernels.cu, which are not installed; choose 'triton'."
    )


def find_nvcc() -> str | None:
    """nvcc of `$CUDA_HOME`, of the PATH, or of /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME")
    for candidate in (home and f"{home}/bin/nvcc", shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        if candidate and os.access(candidate, os.X_OK):
            return candidate
    return None


def cache_folder() -> Path:
    """Where built libraries are kept."""
    chosen = os.environ.get("URLVR_KERNELS_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "urlvr_kernels"


def build(arches: Sequence[str]) -> Path:
    """Compiles for the architectures ("80", "90", ...) unless that was done before. Returns the library's path."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise CudaBuildError(
            "backend: 'cuda' needs nvcc to build its kernels, and none was found in CUDA_HOME, the PATH or "
            "/usr/local/cuda; install the CUDA toolkit, or choose 'triton'."
        )
    files = sources()
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    key = hashlib.sha256(repr((version, sorted(arches), FLAGS)).encode())
    for path in files:
        key.update(path.read_bytes())
    library = cache_folder() / f"urlvr_kernels-{key.hexdigest()[:16]}-sm{'-'.join(sorted(arches))}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in sorted(arches)]
    main = next(path for path in files if path.suffix == ".cu")
    with tempfile.TemporaryDirectory(dir=library.parent) as place:
        made = Path(place) / library.name
        command = [nvcc, *FLAGS, *targets, "-o", str(made), str(main)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise CudaBuildError(f"nvcc could not build the CUDA kernels: {' '.join(command)}\n{done.stderr[-4000:]}")
        os.replace(made, library)  # atomic: other processes may be building the same
    return library


@lru_cache
def load(arch: str) -> ctypes.CDLL:
    """The library for one architecture, built if need be, its ABI and the driver checked."""
    return check(ctypes.CDLL(str(build([arch]))))


def check(library: ctypes.CDLL) -> ctypes.CDLL:
    """Refuses a library of other entry points, or of a newer toolkit than the driver can run."""
    library.urlvr_abi_version.restype = ctypes.c_int
    found = library.urlvr_abi_version()
    if found != ABI_VERSION:
        raise CudaBuildError(
            f"The built CUDA kernels have ABI version {found}, this package needs {ABI_VERSION}; empty "
            f"{cache_folder()}."
        )
    driver, toolkit = ctypes.c_int(), ctypes.c_int()
    library.urlvr_versions(ctypes.byref(driver), ctypes.byref(toolkit))
    if driver.value // 1000 < toolkit.value // 1000:
        built, runs = toolkit.value / 1000, driver.value / 1000
        raise CudaBuildError(
            f"backend: 'cuda' was built with toolkit {built:.1f}, but the driver runs {runs:.1f} at most; "
            "point CUDA_HOME to an older toolkit, or choose 'triton'."
        )
    library.urlvr_error.restype = ctypes.c_char_p
    return library


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds ahead; prints the library's path."""
    parser = argparse.ArgumentParser(description="Build the CUDA kernels of urlvr_kernels ahead of their first use.")
    parser.add_argument("--arch", action="append", required=True, help="compute capability without the dot, as 90")
    chosen = parser.parse_args(arguments)
    try:
        print("\n".join(str(build([arch])) for arch in chosen.arch))
    except CudaBuildError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
