"""The GPU's path, followed without a GPU: shapes, types, memory, and no wait for the device.

Tensors on the meta device have no data: anything that would copy a value to the host fails here. Whatever is not on a
CPU is treated as on a GPU, so all runs but the kernels and cuBLAS; a backend that allocates nothing stands in for them.
"""

from __future__ import annotations

import weakref
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from urlvr_kernels import OUTPUTS, api, lm_head_stats, logits_stats
from urlvr_kernels.call import Shard
from urlvr_kernels.head import head_statistics
from urlvr_kernels.one_pass import one_pass
from urlvr_kernels.passes import backward_pass, forward_pass
from urlvr_kernels.rowstate import Wanted, incoming, statistics
from urlvr_kernels.tp import TensorParallel

MIB = 1 << 20


class NoKernels:
    """A fused backend that computes nothing."""

    name = "none"
    fused = True

    def row_state(self, logits, state, wanted, **_):
        assert logits.stride(0) % 64 == 0, "rows must begin on aligned addresses"
        assert state.dtype == torch.float32

    def dlogits(self, logits, out, slopes, **_):
        assert out.shape == logits.shape
        assert out.dtype == torch.bfloat16, "the GEMMs of the backward want the hidden states' type"

    def merge(self, states, wanted):
        return states[0]


class PeakMemory(TorchDispatchMode):
    """Bytes of storage alive that were allocated inside, now and at most."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage not in self._seen:
                    self._seen.add(storage)
                    self._add(storage.nbytes())
                    weakref.finalize(storage, self._add, -storage.nbytes())
        return result

    def _add(self, count: int) -> None:
        self.now += count
        self.peak = max(self.peak, self.now)


def capture(hidden, weight, target, **arguments):
    """The checked call that `lm_head_stats` would run."""
    calls = []

    def keep(hidden, weight, call):
        calls.append(call)
        return head_statistics(hidden, weight, call)

    with (
        mock.patch.object(api, "head_statistics", keep),
        mock.patch.object(api, "choose_ops", return_value=NoKernels()),
    ):
        lm_head_stats(hidden, weight, target, **arguments)
    return calls[0]


@pytest.mark.parametrize("logits_dtype", [None, torch.float32])
@pytest.mark.parametrize("form", ["recompute", "stash", "one pass"])
def test_the_gpu_path_waits_for_nothing_and_keeps_its_types(form, logits_dtype):
    with torch.no_grad():
        hidden = torch.empty(300, 64, device="meta", dtype=torch.bfloat16)
        weight = torch.empty(5000, 64, device="meta", dtype=torch.bfloat16)
        target = torch.zeros(200, device="meta", dtype=torch.int64)
        call = capture(
            hidden,
            weight,
            target,
            temperature=torch.ones(200, device="meta"),
            row_index=torch.zeros(200, device="meta", dtype=torch.int64),
            vocab_size=4999,
            outputs=OUTPUTS,
            logits_dtype=logits_dtype,
            workspace_bytes=MIB,
            upstream={"logp": torch.ones(200, device="meta")} if form == "one pass" else None,
        )
        assert call.rows.ignored is not None
        if form == "one pass":
            found, grad_hidden, grad_weight = one_pass(hidden, weight, call, (True, True))
        else:
            state, stash = forward_pass(hidden, weight, call, stash_bytes=MIB if form == "stash" else 0)
            lse, entropy, found = statistics(state, OUTPUTS, call.shard.size(state))
            gradient = incoming({"logp": lse, "entropy": lse}, 4999, lse.dtype).slopes(lse, entropy)
            grad_hidden, grad_weight = backward_pass(hidden, weight, call, gradient, stash, (True, True))
        assert found["logp"].shape == (200,)
        assert found["logp"].dtype == torch.float32
        assert (grad_hidden.shape, grad_hidden.dtype) == (hidden.shape, torch.bfloat16)
        assert (grad_weight.shape, grad_weight.dtype) == (weight.shape, torch.bfloat16)


@pytest.mark.parametrize("temperatures", [(), (7,)], ids=["one temperature", "one a row"])
def test_logits_stats_waits_for_nothing(temperatures):
    with torch.no_grad(), mock.patch.object(api, "choose_ops", return_value=NoKernels()):
        logits = torch.empty(7, 50304, device="meta", dtype=torch.bfloat16)
        target = torch.zeros(7, device="meta", dtype=torch.int64)
        stats = logits_stats(
            logits, target, temperature=torch.ones(temperatures, device="meta"), vocab_size=50257, outputs=OUTPUTS
        )
        assert stats.argmax.dtype == torch.int64


@pytest.mark.parametrize("vocab_size", [None, 9999])
def test_shards_are_joined_and_checked_without_waiting(vocab_size):
    state, target = torch.empty(8, 7, device="meta"), torch.empty(7, device="meta", dtype=torch.int64)
    shard = Shard(5000, 5000, vocab_size, TensorParallel(mock.sentinel.group, size=2, rank=1))
    sent = []

    def gather(out, mine, group):
        sent.append((mine.shape, out.shape))

    with mock.patch.object(torch.distributed, "all_gather_into_tensor", gather):
        joined = shard.join(state, target, NoKernels(), Wanted())
    assert sent == [((8 * 7 + 4,), (2 * (8 * 7 + 4),))]
    assert joined.shape == (8, 7)


@pytest.mark.parametrize("wgrad", ["autograd", "main_grad"])
@pytest.mark.parametrize(
    ("rows", "width", "vocab"), [(8192, 4096, 151936), (8192, 8192, 128256), (4096, 5120, 152064), (8192, 4096, 18992)]
)
def test_recomputing_takes_at_most_300_mb_beyond_inputs_and_gradients(rows, width, vocab, wgrad):
    hidden = torch.empty(rows, width, device="meta", dtype=torch.bfloat16)
    weight = torch.empty(vocab, width, device="meta", dtype=torch.bfloat16, requires_grad=True)
    weight.main_grad = torch.empty(vocab, width, device="meta")
    with torch.no_grad():
        call = capture(hidden, weight, torch.zeros(rows, device="meta", dtype=torch.int64), wgrad=wgrad)
        with PeakMemory(hidden, weight, call.rows.target, call.rows.ignored) as forward:
            state, stash = forward_pass(hidden, weight, call, stash_bytes=0)
            lse, entropy, _ = statistics(state, call.outputs, vocab)
        with PeakMemory(
            hidden, weight, call.rows.target, call.rows.ignored, weight.main_grad, lse, entropy
        ) as backward:
            given = {"logp": lse, "entropy": lse, "self_certainty": lse}
            gradient = incoming(given, vocab, lse.dtype).slopes(lse, entropy)
            grads = backward_pass(hidden, weight, call, gradient, stash, (True, True))
        own = sum(grad.untyped_storage().nbytes() for grad in grads if grad is not None)
    assert 30e6 < forward.peak <= 300e6
    assert 30e6 < backward.peak - own <= 300e6
