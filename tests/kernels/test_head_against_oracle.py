"""lm_head_stats against the float64 oracle: every output, every gradient, every way through the tiles."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    RELATIVE,
    Case,
    assert_grad_close,
    assert_stats_close,
    make_case,
    oracle,
    small_tiles,
    weighted_sum,
)
from urlvr_kernels import DIFFERENTIABLE, OUTPUTS, lm_head_stats

FORMS = {
    "recompute": {"stash_bytes": 0},
    "stash all": {"stash_bytes": 1 << 30},
    "stash some": {"stash_bytes": 5000},
}


def run(case: Case, outputs: tuple[str, ...], differentiate: tuple[str, ...], **arguments: object):
    """Statistics and gradients of the kernel."""
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    stats = lm_head_stats(hidden, weight, case.target, outputs=outputs, **arguments)  # type: ignore[arg-type]
    if differentiate:
        weighted_sum(stats, case.grads, differentiate).backward()
    return stats, hidden.grad, weight.grad


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 16, 11), (7, 16, 129), (64, 80, 1000), (33, 5, 1408)])
def test_every_output_and_gradient_agrees_with_float64_autograd(shape, dtype, form):
    case = make_case(*shape, dtype=dtype)
    expected = oracle(case, OUTPUTS, DIFFERENTIABLE)
    for elements, rows in ((1 << 20, 256), (1500, 5), (1024, 1)):
        with small_tiles(elements, rows):
            found = run(case, OUTPUTS, DIFFERENTIABLE, **FORMS[form])
        assert_stats_close(found[0], expected[0], OUTPUTS, RELATIVE[dtype])
        assert_grad_close(found[1], expected[1], RELATIVE[dtype], "hidden")
        assert_grad_close(found[2], expected[2], RELATIVE[dtype], "weight")


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_statistic_asked_for_alone_has_the_same_value_and_gradient(name):
    case = make_case(19, 12, 300)
    expected = oracle(case, (name,), (name,))
    with small_tiles(1500, 7):
        found = run(case, (name,), (name,), stash_bytes=0)
    assert_stats_close(found[0], expected[0], (name,), 1e-11)
    assert_grad_close(found[1], expected[1], 1e-11, "hidden")
    assert_grad_close(found[2], expected[2], 1e-11, "weight")


@pytest.mark.parametrize("used", [("logp",), ("entropy", "lse"), ("self_certainty",)])
def test_statistics_that_the_loss_does_not_use_add_no_gradient(used):
    case = make_case(9, 6, 50)
    expected = oracle(case, OUTPUTS, used)
    found = run(case, OUTPUTS, used)
    assert_grad_close(found[1], expected[1], 1e-11, "hidden")
    assert_grad_close(found[2], expected[2], 1e-11, "weight")


def test_a_temperature_per_token_divides_each_rows_logits():
    case = make_case(23, 8, 90)
    tau = torch.rand(23, dtype=torch.float64) * 1.5 + 0.4
    expected = oracle(case, OUTPUTS, DIFFERENTIABLE, temperature=tau)
    with small_tiles(1024, 4):
        found = run(case, OUTPUTS, DIFFERENTIABLE, temperature=tau, stash_bytes=0)
    assert_stats_close(found[0], expected[0], OUTPUTS, 1e-11)
    assert_grad_close(found[1], expected[1], 1e-11, "hidden")
    assert_grad_close(found[2], expected[2], 1e-11, "weight")
    one = run(case, OUTPUTS, DIFFERENTIABLE, temperature=0.7)
    same = run(case, OUTPUTS, DIFFERENTIABLE, temperature=torch.full((23,), 0.7, dtype=torch.float64))
    assert_stats_close(one[0], same[0], OUTPUTS, 1e-12)


def test_padding_behind_the_vocabulary_counts_nowhere_and_gets_no_gradient():
    case = make_case(11, 8, 64)
    case.target %= 50
    case.weight[50:] = 1e3  # would win every softmax
    expected = oracle(case, OUTPUTS, DIFFERENTIABLE, vocab_size=50)
    found = run(case, OUTPUTS, DIFFERENTIABLE, vocab_size=50)
    assert_stats_close(found[0], expected[0], OUTPUTS, 1e-11)
    assert_grad_close(found[1], expected[1], 1e-11, "hidden")
    assert_grad_close(found[2], expected[2], 1e-11, "weight")
    assert torch.count_nonzero(found[2][50:]) == 0


@pytest.mark.parametrize("blanked", [False, True], ids=["rows dropped", "rows blanked"])
@pytest.mark.parametrize("form", FORMS)
def test_ignored_rows_leave_no_trace_even_if_they_hold_garbage(form, blanked, monkeypatch):
    if blanked:  # what GPUs do, where the number of ignored rows is not known on the host
        monkeypatch.setattr("urlvr_kernels.api._drops_ignored_rows", lambda target: False)
    case = make_case(16, 8, 40)
    case.target[::3] = -100
    expected = oracle(case, OUTPUTS, DIFFERENTIABLE)
    case.hidden[0], case.hidden[3], case.hidden[6] = float("nan"), float("inf"), -1e30
    found = run(case, OUTPUTS, DIFFERENTIABLE, **FORMS[form])
    assert_stats_close(found[0], expected[0], OUTPUTS, 1e-11)
    assert torch.count_nonzero(found[0].entropy[::3]) == 0
    assert (found[0].argmax[::3] == -1).all()
    assert torch.count_nonzero(found[1][::3]) == 0
    assert_grad_close(found[1], expected[1], 1e-11, "hidden")
    assert_grad_close(found[2], expected[2], 1e-11, "weight")


def test_row_index_reads_those_rows_alone_and_the_others_get_no_gradient():
    case = make_case(20, 8, 40)
    rows = torch.tensor([3, 17, 4, 9, 0])
    tau = torch.rand(5, dtype=torch.float64) + 0.5
    part = Case(case.hidden[rows], case.weight, case.target[:5], {k: g[:5] for k, g in case.grads.items()})
    part.target[2] = -100
    expected = oracle(part, OUTPUTS, DIFFERENTIABLE, temperature=tau)
    whole = Case(case.hidden, case.weight, part.target, part.grads)
    found = run(whole, OUTPUTS, DIFFERENTIABLE, row_index=rows, temperature=tau)
    assert_stats_close(found[0], expected[0], OUTPUTS, 1e-11)
    grad = torch.zeros_like(case.hidden).index_copy(0, rows, expected[1])
    assert_grad_close(found[1], grad, 1e-11, "hidden")
    assert_grad_close(found[2], expected[2], 1e-11, "weight")


@pytest.mark.parametrize("upstream", [False, True])
@pytest.mark.parametrize("ignore", [False, True], ids=["no rows", "all rows ignored"])
def test_without_any_rows_there_are_no_statistics_and_zero_gradients(ignore, upstream):
    case = make_case(4 if ignore else 0, 8, 40)
    case.target.fill_(-100)
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    arguments = {"upstream": {"logp": case.grads["logp"]}} if upstream else {}
    stats = lm_head_stats(hidden, weight, case.target, outputs=OUTPUTS, **arguments)
    (stats.loss if upstream else weighted_sum(stats, case.grads, DIFFERENTIABLE)).backward()
    assert stats.logp.shape == case.target.shape
    assert torch.count_nonzero(hidden.grad) == 0
    assert torch.count_nonzero(weight.grad) == 0


def test_a_vocabulary_of_one_entry_is_certain():
    case = make_case(5, 4, 1)
    stats = run(case, OUTPUTS, DIFFERENTIABLE)[0]
    for name, value in (("logp", 0), ("entropy", 0), ("self_certainty", 0), ("top2_gap", 1), ("max_prob", 1)):
        assert torch.allclose(getattr(stats, name), torch.full((5,), float(value), dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize(("offset", "scale"), [(-200.0, 1.0), (1000.0, 1.0), (-1000.0, 1.0), (0.0, 12.0)])
def test_offsets_and_confident_tokens_lose_no_accuracy_beyond_the_logits_own_rounding(offset, scale):
    case = make_case(16, 8, 700)
    case = Case(
        torch.cat([case.hidden * scale, torch.full((16, 1), offset, dtype=torch.float64)], 1).float(),
        torch.cat([case.weight, torch.ones(700, 1, dtype=torch.float64)], 1).float(),
        case.target,
        {k: g.float() for k, g in case.grads.items()},
    )
    case.target[:8] = (case.hidden[:8] @ case.weight.T).argmax(-1)
    expected = oracle(case, OUTPUTS, DIFFERENTIABLE)
    with small_tiles(1500, 5):
        found = run(case, OUTPUTS, DIFFERENTIABLE, stash_bytes=0)
    ulp = max(abs(offset), 10 * scale) * 2.0**-23
    for name in ("logp", "entropy", "self_certainty", "lse", "max_prob", "top2_gap"):
        error = (getattr(found[0], name).double() - getattr(expected[0], name)).abs().max().item()
        assert error <= 1e-5 + 2 * ulp, f"{name}: {error:.1e}"
    assert_grad_close(found[2], expected[2], 1e-5 + 4 * ulp, "weight")


def test_confident_tokens_keep_their_small_gradient():
    case = make_case(8, 4, 60, dtype=torch.float32)
    hidden = torch.cat([case.hidden, 25 * torch.ones(8, 1)], 1)
    weight = torch.cat([case.weight, torch.zeros(60, 1)], 1)
    weight[7, -1] = 1.0
    case = Case(hidden, weight, torch.full((8,), 7), case.grads)
    expected = oracle(case, ("logp",), ("logp",))
    found = run(case, ("logp",), ("logp",))
    assert expected[2].abs().max() < 1e-6  # 1 - p is some 1e-9
    off_target = torch.arange(60) != 7
    assert_grad_close(found[2][off_target], expected[2][off_target], 1e-5, "weight, other rows")


def test_of_equal_largest_logits_the_lowest_id_is_the_argmax_and_the_gap_is_zero():
    hidden = torch.ones(3, 1)
    weight = torch.tensor([[0.0], [5.0], [1.0], [5.0], [5.0]]).repeat(400, 1)
    with small_tiles(1024, 2):
        stats = lm_head_stats(hidden, weight, None, outputs=("argmax", "top2_gap"))
    assert stats.argmax.tolist() == [1, 1, 1]
    assert stats.top2_gap.abs().max() == 0


def test_half_precision_inputs_are_widened_on_cpu_and_their_gradients_rounded_once():
    case = make_case(12, 16, 200, dtype=torch.bfloat16)
    expected = oracle(case, OUTPUTS, DIFFERENTIABLE)
    with small_tiles(1200, 5):
        found = run(case, OUTPUTS, DIFFERENTIABLE, stash_bytes=0)
    assert found[0].logp.dtype == torch.float32
    assert_stats_close(found[0], expected[0], OUTPUTS, 1e-5)
    assert found[1].dtype == found[2].dtype == torch.bfloat16
    assert_grad_close(found[1], expected[1].bfloat16(), 4e-4, "hidden")
    assert_grad_close(found[2], expected[2].bfloat16(), 4e-4, "weight")


def test_gradients_pass_gradcheck():
    case = make_case(4, 5, 11)

    def f(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        stats = lm_head_stats(hidden, weight, case.target, temperature=0.8, vocab_size=10, outputs=DIFFERENTIABLE)
        return stats.logp, stats.entropy, stats.self_certainty, stats.lse

    case.target %= 10
    assert torch.autograd.gradcheck(f, (case.hidden.requires_grad_(), case.weight.requires_grad_()))


def test_a_second_backward_through_a_retained_graph_gives_the_same_gradient():
    case = make_case(9, 6, 50)
    for form in FORMS.values():
        hidden = case.hidden.clone().requires_grad_()
        loss = lm_head_stats(hidden, case.weight, case.target, **form).logp.sum()
        (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
        (second,) = torch.autograd.grad(loss, hidden)
        assert torch.equal(first, second)


def test_a_frozen_head_or_frozen_hidden_states_cost_no_gradient():
    case = make_case(9, 6, 50)
    expected = oracle(case, ("logp",), ("logp",))
    hidden = case.hidden.clone().requires_grad_()
    weighted_sum(lm_head_stats(hidden, case.weight, case.target), case.grads, ("logp",)).backward()
    assert_grad_close(hidden.grad, expected[1], 1e-11, "hidden")
    weight = case.weight.clone().requires_grad_()
    weighted_sum(lm_head_stats(case.hidden, weight, case.target), case.grads, ("logp",)).backward()
    assert_grad_close(weight.grad, expected[2], 1e-11, "weight")
    assert not lm_head_stats(case.hidden, case.weight, case.target).logp.requires_grad


def test_results_are_the_same_bits_run_after_run():
    case = make_case(40, 16, 500, dtype=torch.float32)
    with small_tiles(1024, 8):
        first, second = (run(case, OUTPUTS, DIFFERENTIABLE, stash_bytes=3000) for _ in range(2))
    assert torch.equal(first[1], second[1])
    assert torch.equal(first[2], second[2])
    assert all(torch.equal(getattr(first[0], k), getattr(second[0], k)) for k in OUTPUTS)
