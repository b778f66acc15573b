"""The Triton kernels compile for GPUs (no GPU is needed for that) and move 16 bytes at a time.

The interpreter does not check what the compiler does: types of loop-carried values, and whether loads can be
vectorised.
"""

from __future__ import annotations

import re
from collections import Counter

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from urlvr_kernels import triton_kernels  # noqa: E402

TYPES = {
    "logits": "*bf16",
    "out": "*bf16",
    "target": "*i64",
    "stride": "i64",
    "out_stride": "i64",
    "field_stride": "i64",
    "split_stride": "i64",
    "state_stride": "i64",
    "out_field_stride": "i64",
    "first": "i32",
    "columns": "i32",
    "split_columns": "i32",
    "count": "i32",
    "rows": "i32",
    "tau_number": "fp32",
}


def compile_for(
    capability: int, kernel, warps: int, changed: dict[str, str] | None = None, **constants: int
) -> Counter[str]:
    """Counts the memory instructions, every flag on, rows aligned, and a number of columns divisible by nothing."""
    names = kernel.arg_names
    constants |= {name: True for name in names if name.startswith(("WITH_", "RANKED", "TAU_"))}
    types = TYPES | (changed or {})
    signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name in ("stride", "out_stride", "split_columns")
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=aligned,
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    assert len(compiled.asm["cubin"]) > 0
    return Counter(re.findall(r"(?:ld|st)\.global[.\w]*", compiled.asm["ptx"]))


@pytest.mark.parametrize("capability", [80, 90])
def test_statistics_read_16_bytes_at_a_time(capability):
    found = compile_for(capability, triton_kernels.row_state_kernel, 8, BLOCK=4096)
    assert found["ld.global.v4.b32"] >= 2


@pytest.mark.parametrize("capability", [80, 90])
def test_dlogits_read_and_write_16_bytes_at_a_time(capability):
    found = compile_for(capability, triton_kernels.dlogits_kernel, 8, BLOCK=2048)
    assert found["ld.global.v4.b32"] >= 1
    assert found["st.global.v4.b32"] >= 1


@pytest.mark.parametrize("capability", [80, 90])
def test_float32_logits_give_bfloat16_slopes(capability):
    found = compile_for(capability, triton_kernels.dlogits_kernel, 8, {"logits": "*fp32", "target": "*i32"}, BLOCK=2048)
    assert found["ld.global.v4.b32"] >= 1


def test_merging_compiles():
    compile_for(90, triton_kernels.merge_kernel, 4, BLOCK=128)
