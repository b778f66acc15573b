"""What each rank of the tensor-parallel tests runs; in a module of its own so that spawned processes can import it."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from kernel_cases import Case, assert_grad_close, assert_stats_close, make_case, oracle, small_tiles, weighted_sum
from urlvr_kernels import DIFFERENTIABLE, OUTPUTS, lm_head_stats, logits_stats, reference


def start(rank: int, size: int, folder: str) -> dist.ProcessGroup:
    """Joins the gloo group that meets in `folder`."""
    torch.set_num_threads(1)
    os.environ.pop("MASTER_ADDR", None)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    group = dist.group.WORLD
    assert group is not None
    return group


def check_head(rank: int, size: int, group: dist.ProcessGroup, cuts: list[int], vocab_size: int) -> None:
    """Every form of the head on unequal shards against the single-process float64 oracle."""
    rows = 6 * size
    case = make_case(rows, 9, cuts[-1])
    case.target %= vocab_size
    case.target[4] = -100
    tau = torch.rand(rows, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.5
    mine = slice(cuts[rank], cuts[rank + 1])
    expected = oracle(case, OUTPUTS, DIFFERENTIABLE, temperature=tau, vocab_size=vocab_size)
    for sequence_parallel in (False, True):
        shard = slice(rank * 6, rank * 6 + 6) if sequence_parallel else slice(None)
        for main_grad in (False, True):
            for form in ("recompute", "stash", "one pass"):
                hidden = case.hidden[shard].clone().requires_grad_()
                weight = case.weight[mine].clone().requires_grad_()
                if main_grad:
                    weight.main_grad = torch.ones_like(weight)  # type: ignore[attr-defined]
                with small_tiles(1024, 5):
                    stats = lm_head_stats(
                        hidden,
                        weight,
                        case.target,
                        temperature=tau,
                        vocab_start=cuts[rank],
                        vocab_size=None if vocab_size == cuts[-1] and form != "one pass" else vocab_size,
                        tp_group=group,
                        sequence_parallel=sequence_parallel,
                        outputs=OUTPUTS,
                        upstream=case.grads if form == "one pass" else None,
                        stash_bytes=1 << 20 if form == "stash" else 0,
                        workspace_bytes=4096,
                        wgrad="main_grad" if main_grad else "autograd",
                    )
                    loss = stats.loss if form == "one pass" else weighted_sum(stats, case.grads, DIFFERENTIABLE)
                    loss.backward()
                assert_stats_close(stats, expected[0], OUTPUTS, 1e-11)
                assert_grad_close(hidden.grad, expected[1][shard], 1e-11, "hidden")
                found = weight.main_grad - 1 if main_grad else weight.grad  # type: ignore[attr-defined]
                if vocab_size > cuts[rank]:
                    assert_grad_close(found, expected[2][mine], 1e-11, "weight")
                else:
                    assert torch.count_nonzero(found) == 0
                assert main_grad == (weight.grad is None)


def check_rows_and_bits(rank: int, size: int, group: dist.ProcessGroup) -> None:
    """row_index under sequence parallelism, and the same bits on every rank."""
    case = make_case(4 * size, 8, 60, dtype=torch.float32)
    index = torch.tensor([5, 0, 3])
    part = Case(case.hidden[index], case.weight, case.target[:3], {k: g[:3] for k, g in case.grads.items()})
    expected = oracle(part, OUTPUTS, DIFFERENTIABLE)
    width = 60 // size
    hidden = case.hidden[rank * 4 : rank * 4 + 4].clone().requires_grad_()
    weight = case.weight[rank * width : (rank + 1) * width].clone().requires_grad_()
    stats = lm_head_stats(
        hidden,
        weight,
        part.target,
        vocab_start=rank * width,
        tp_group=group,
        sequence_parallel=True,
        row_index=index,
        outputs=OUTPUTS,
    )
    weighted_sum(stats, part.grads, DIFFERENTIABLE).backward()
    assert_stats_close(stats, expected[0], OUTPUTS, 1e-5)
    full = torch.zeros(4 * size, 8, dtype=torch.float64).index_copy(0, index, expected[1])
    assert_grad_close(hidden.grad, full[rank * 4 : rank * 4 + 4], 1e-5, "hidden")
    everywhere = [torch.empty_like(stats.entropy) for _ in range(size)]
    dist.all_gather(everywhere, stats.entropy.detach())
    assert all(torch.equal(everywhere[0], other) for other in everywhere)


def check_logits(rank: int, size: int, group: dist.ProcessGroup, cuts: list[int]) -> None:
    """Vocabulary-parallel logits on unequal shards."""
    case = make_case(12, 6, cuts[-1])
    case.target[3] = -100
    exact = (case.hidden @ case.weight.T).requires_grad_()
    expected = reference.logits_stats(exact, case.target, temperature=0.7, outputs=OUTPUTS)
    weighted_sum(expected, case.grads, DIFFERENTIABLE).backward()
    mine = slice(cuts[rank], cuts[rank + 1])
    logits = exact.detach()[:, mine].clone().requires_grad_()
    stats = logits_stats(logits, case.target, temperature=0.7, vocab_start=cuts[rank], tp_group=group, outputs=OUTPUTS)
    weighted_sum(stats, case.grads, DIFFERENTIABLE).backward()
    assert_stats_close(stats, expected, OUTPUTS, 1e-11)
    assert_grad_close(logits.grad, exact.grad[:, mine], 1e-11, "logits")


def run_all(rank: int, size: int, folder: str) -> None:
    """Every check of one group size, in one set of processes (starting them is what takes the time)."""
    group = start(rank, size, folder)
    cuts = {2: [0, 29, 53], 3: [0, 11, 40, 53]}[size]
    check_head(rank, size, group, cuts, vocab_size=53)
    check_head(rank, size, group, cuts, vocab_size=cuts[-2] - 2)  # the last shard is padding alone
    # Rows of logits with room between them; a first shard that is wider than an equal share, as padding makes it.
    wide = {2: [0, 320, 600], 3: [0, 300, 330, 600]}[size]
    check_head(rank, size, group, wide, vocab_size=600)
    check_rows_and_bits(rank, size, group)
    check_logits(rank, size, group, cuts)
    dist.destroy_process_group()
