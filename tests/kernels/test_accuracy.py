"""Half-precision inputs: every output and every gradient errs no more than materialised torch does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from urlvr_kernels import DIFFERENTIABLE, OUTPUTS

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels" / "benchmarks"))

from accuracy import compare, table
from cases import Shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_output_and_gradient_errs_no_more_than_materialised_torch(dtype):
    found = compare(Shape(48, 64, 4099), dtype, torch.device("cpu"))
    gradients = [
        f"{label}{what} grad" for label in ("", *(f"{k}, " for k in DIFFERENTIABLE)) for what in ("hidden", "weight")
    ]
    assert set(found) == {*OUTPUTS, *gradients}
    worse = {name: both for name, both in found.items() if not both["ours"] <= both["torch"]}
    assert not worse
    assert found["logp"]["torch"] > 0, "a comparison with nothing"
    assert len(table(found).splitlines()) == 2 + len(OUTPUTS) + 1
