"""Megatron's gradient accumulation fusion: the weight's gradient goes into `main_grad`, and DDP's hooks are told so."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import assert_grad_close, make_case, oracle, small_tiles, weighted_sum
from urlvr_kernels import lm_head_stats


def ddp_hook(weight: torch.Tensor) -> None:
    """What Megatron-Core's DistributedDataParallel does when a parameter's gradient has been accumulated."""
    if weight.grad is not None and (not weight.grad_added_to_main_grad or getattr(weight, "zero_out_wgrad", False)):
        weight.main_grad.add_(weight.grad.data)
    weight.grad = None


def backward(case, weight: torch.Tensor, one_pass: bool, extra: torch.Tensor | None = None) -> None:
    upstream = {"logp": case.grads["logp"]} if one_pass else None
    with small_tiles(1024, 4):
        stats = lm_head_stats(case.hidden, weight, case.target, upstream=upstream, wgrad="main_grad")
        loss = stats.loss if one_pass else weighted_sum(stats, case.grads, ("logp",))
        (loss if extra is None else loss + extra).backward()


def parameter(case, dtype: torch.dtype) -> torch.Tensor:
    weight = case.weight.clone().requires_grad_()
    weight.main_grad = torch.zeros_like(weight, dtype=dtype, requires_grad=False)
    weight.grad_added_to_main_grad = False
    return weight


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize(
    ("dtype", "main_dtype", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-11),
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 1e-5),
        (torch.bfloat16, torch.bfloat16, 1e-2),
    ],
)
def test_micro_batches_accumulate_in_main_grad(dtype, main_dtype, tolerance, one_pass):
    weight, total = None, 0
    for seed in range(3):
        case = make_case(10, 8, 90, seed=seed, dtype=dtype)
        weight = parameter(case, main_dtype) if weight is None else weight
        case.weight = weight.detach()
        total = total + oracle(case, ("logp",), ("logp",))[2]
        backward(case, weight, one_pass)
        assert weight.grad_added_to_main_grad
        ddp_hook(weight)
    assert_grad_close(weight.main_grad, total, tolerance, "weight")


@pytest.mark.parametrize("one_pass", [False, True])
def test_a_head_tied_to_the_embedding_gets_both_gradients_once(one_pass):
    case = make_case(10, 8, 90)
    weight = parameter(case, torch.float64)
    weight.zero_out_wgrad = True  # Megatron sets it where the embedding shares the head's weight
    factor = torch.randn(10, 8, dtype=torch.float64)
    backward(case, weight, one_pass, (torch.nn.functional.embedding(case.target, weight) * factor).sum())
    ddp_hook(weight)
    expected = oracle(case, ("logp",), ("logp",))[2].index_add(0, case.target, factor)
    assert_grad_close(weight.main_grad, expected, 1e-11, "weight")


def test_without_megatrons_flag_no_placeholder_is_returned():
    case = make_case(10, 8, 90)
    weight = parameter(case, torch.float64)
    del weight.grad_added_to_main_grad
    backward(case, weight, one_pass=False)
    assert weight.grad is None
    assert_grad_close(weight.main_grad, oracle(case, ("logp",), ("logp",))[2], 1e-11, "weight")


def test_rows_that_are_all_ignored_still_announce_the_gradient():
    case = make_case(4, 8, 30)
    case.target.fill_(-100)
    weight = parameter(case, torch.float64)
    backward(case, weight, one_pass=False)
    assert weight.grad_added_to_main_grad
    assert weight.grad is not None
    assert torch.count_nonzero(weight.main_grad) == 0


def test_a_weight_without_main_grad_is_refused():
    case = make_case(4, 8, 30)
    with pytest.raises(ValueError, match=r"^wgrad: 'main_grad', but the weight has no contiguous `main_grad`"):
        lm_head_stats(case.hidden, case.weight.requires_grad_(), case.target, wgrad="main_grad")
