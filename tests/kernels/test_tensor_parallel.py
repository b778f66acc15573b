"""The head and the logits over vocabulary shards, on real gloo groups, against the single-process float64 oracle."""

from __future__ import annotations

from pathlib import Path

import kernel_workers
import pytest
import torch.multiprocessing as mp


@pytest.mark.parametrize("size", [2, 3])
def test_unequal_shards_give_the_whole_vocabularys_statistics_and_gradients(size: int, tmp_path: Path):
    mp.spawn(kernel_workers.run_all, args=(size, str(tmp_path)), nprocs=size)
