"""What each rank of the tensor-parallel tests runs; in a module of its own so that spawned processes can import it."""

from __future__ import annotations

import os
from collections.abc import Callable

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


def refusal(function: Callable[..., object], **arguments: object) -> str:
    """The sentence of the ValueError that the call ends with."""
    try:
        function(**arguments)
    except ValueError as error:
        return str(error)
    return "nothing was refused"


TOGETHER: dict[str, tuple[str, dict[str, object], dict[str, object]]] = {
    "a target beyond the last shard": ("target: ids outside 0 .. 9;", {"vocab_start": 0}, {"vocab_start": 4}),
    "shards that overlap": ("vocab_start: the shards [[0, 4], [3, 9]]", {"vocab_start": 0}, {"vocab_start": 3}),
    "a gap between shards": ("vocab_start: the shards [[0, 4], [5, 11]]", {"vocab_start": 0}, {"vocab_start": 5}),
    "two first shards": ("vocab_start: the shards [[0, 4], [0, 6]]", {"vocab_start": 0}, {"vocab_start": 0}),
    "too few entries": (
        "vocab_start: the shards [[0, 4], [4, 10]] of tp_group (first id, id behind the last) overlap, leave a gap or "
        "do not make up vocab_size=13;",
        {"vocab_start": 0, "vocab_size": 13},
        {"vocab_start": 4, "vocab_size": 13},
    ),
    "two sizes": ("vocab_size: ", {"vocab_start": 0, "vocab_size": 14}, {"vocab_start": 4, "vocab_size": 13}),
}
"""Sentence of both ranks, and the arguments of each, which alone could be right; shards are 4 and 6 wide."""

ALONE: dict[str, tuple[str, dict[str, object]]] = {
    "an empty shard": ("weight: an empty shard", {"weight": torch.zeros(0, 3)}),
    "a shard before the first entry": ("vocab_start: -1", {"vocab_start": -1}),
    "a narrower shard": ("weight: shape (6, 2)", {"weight": torch.zeros(6, 2)}),
    "a shard of another type": ("weight: dtype torch.float64", {"weight": torch.zeros(6, 3, dtype=torch.float64)}),
    "no main_grad": (
        "wgrad: 'main_grad', but the weight has no",
        {"weight": torch.zeros(6, 3, requires_grad=True), "wgrad": "main_grad"},
    ),
}
"""Sentence of the last rank, and what is wrong with its arguments; the other's are right."""


def check_refusals(rank: int, group: dist.ProcessGroup) -> None:
    """What is wrong with one rank's arguments, or with both ranks' together, is refused on both: neither waits."""
    hidden, target = torch.zeros(4, 3), torch.tensor([12, 0, -100, 3])
    weight = torch.zeros((4, 6)[rank], 3)
    for name, (sentence, *arguments) in TOGETHER.items():
        more = {"target": target, "tp_group": group, **arguments[rank]}
        head = refusal(lm_head_stats, hidden=hidden, weight=weight, **more)
        logits = refusal(logits_stats, logits=hidden @ weight.T, **more)
        assert head.startswith(sentence), f"{name}: {head}"
        assert logits.startswith(sentence), f"{name}: {logits}"
    right = {"weight": weight, "vocab_start": 4 * rank, "vocab_size": 10, "tp_group": group}
    one_pass = {"hidden": hidden.clone().requires_grad_(), "upstream": {"logp": torch.ones(4)}}
    nothing = torch.empty(0, dtype=torch.int64)
    forms: list[dict[str, object]] = [
        {},
        one_pass,
        {"hidden": hidden[:2], "sequence_parallel": True},
        {"row_index": nothing, "target": nothing},
        {**one_pass, "target": torch.full((4,), -100)},
    ]
    for name, (alone, wrong) in ALONE.items():
        sentence = alone if rank else "tp_group: another of its ranks refused an argument"
        for changed in forms:
            arguments = {"hidden": hidden, "target": target % 10, **right, **changed, **(wrong if rank else {})}
            found = refusal(lm_head_stats, **arguments)
            assert found.startswith(sentence), f"{name} {list(changed)}: {found}"


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
    if size == 2:
        check_refusals(rank, group)
    dist.destroy_process_group()
