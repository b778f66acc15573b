"""Reference and EMA weights beside the policy's."""

import pytest
import torch
from tiny_models import hf_model, oracle_stats, random_rows
from torch import Tensor

from megatron_urlvr.algorithms.losses import LossInputs
from megatron_urlvr.config.optim import OptimSection
from megatron_urlvr.policy.batch import Row
from megatron_urlvr.policy.policy import Policy
from megatron_urlvr.types import TokenStats

LOGP = frozenset({"logp"})


class Likelihood:
    needs = LOGP

    def upstream(self, inputs: LossInputs) -> None:
        return None

    def __call__(self, stats: TokenStats, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        return -(stats.get("logp") * inputs.weight).sum(), {}

    def finish(self, sums):
        return dict(sums)


def rows() -> list[Row]:
    made = random_rows(6, vocab=29)
    for row in made:
        row.weight = torch.full((len(row.response),), 0.05)
    return made


def bits(policy: Policy) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in policy.parameters.items()}


def logps(policy: Policy, weights="policy") -> Tensor:
    return torch.cat([stats.get("logp") for stats in policy.score(rows(), LOGP, weights)])


def test_the_reference_stays_at_the_start_while_the_policy_moves(make_policy):
    policy = make_policy(optim=OptimSection(lr=1e-2), keep_reference=True)
    start = logps(policy)
    policy.update(rows(), Likelihood(), lr=1e-2)
    moved = logps(policy)
    assert not torch.allclose(start, moved, atol=1e-2)
    assert torch.equal(logps(policy, "reference"), start)
    assert torch.equal(logps(policy), moved)


def test_the_policys_weights_come_back_to_the_bit_even_when_scoring_fails(make_policy, monkeypatch):
    policy = make_policy("tied", optim=OptimSection(lr=1e-2), keep_reference=True)
    policy.update(rows(), Likelihood(), lr=1e-2)
    before = bits(policy)

    def fails(*args, **kwargs):
        assert not all(torch.equal(p, before[name]) for name, p in policy.parameters.items())
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(policy, "_run", fails)
        with pytest.raises(ZeroDivisionError):
            policy.score(rows(), LOGP, "reference")
    after = bits(policy)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_weights_come_back_when_a_shadow_does_not_fit_half_way_through(make_policy):
    policy = make_policy(keep_reference=True)
    before = bits(policy)
    assert policy.reference is not None
    last = list(policy.reference.tensors)[-1]
    policy.reference.tensors[last] = torch.zeros(3, 7, 5)
    with pytest.raises(RuntimeError):
        policy.score(rows(), LOGP, "reference")
    after = bits(policy)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_swapping_tells_caches_that_the_weights_are_others(make_policy):
    """Autograd's version counter is what the head's cached sums are keyed by."""
    policy = make_policy(keep_reference=True)
    weight = policy.chunks[0].output_layer.weight
    versions = [weight._version]
    assert policy.reference is not None
    with policy.reference.swapped_into(policy.parameters):
        versions.append(weight._version)
    versions.append(weight._version)
    assert versions == sorted(set(versions))


def test_self_certainty_is_the_weights_own_on_both_sides_of_a_swap(make_policy, folders):
    """Column sums of the head are cached; a stale one would give the reference's self-certainty to the policy."""
    policy = make_policy(keep_reference=True)
    assert policy.reference is not None
    for tensor in policy.reference.tensors.values():
        tensor.mul_(1.2)
    want = frozenset({"self_certainty"})
    expected = torch.cat([oracle_stats(hf_model(folders["untied"]), row)["self_certainty"] for row in rows()])
    for _ in range(2):
        own = torch.cat([stats.get("self_certainty") for stats in policy.score(rows(), want)])
        other = torch.cat([stats.get("self_certainty") for stats in policy.score(rows(), want, "reference")])
        assert torch.allclose(own.double(), expected, rtol=0, atol=1e-5)
        assert not torch.allclose(other.double(), expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize("distributed", [False, True], ids=["plain optimizer", "distributed optimizer"])
def test_the_moving_average_is_the_recursion_over_the_steps_taken(make_policy, distributed: bool):
    section = OptimSection(lr=1e-2, ema_decay=0.7)
    policy = make_policy(optim=section, parallel={"distributed_optimizer": distributed})
    expected = {name: tensor.double() for name, tensor in bits(policy).items()}
    for _ in range(4):
        policy.update(rows(), Likelihood(), lr=1e-2)
        now = bits(policy)
        expected = {name: 0.7 * expected[name] + 0.3 * now[name].double() for name in expected}
    assert policy.ema is not None
    for name, tensor in policy.ema.tensors.items():
        assert tensor.dtype == torch.float32
        assert torch.allclose(tensor.double(), expected[name], rtol=0, atol=1e-6), name
        assert not torch.equal(tensor, now[name])
    scored = logps(policy, "ema")
    with torch.no_grad():
        for name, parameter in policy.parameters.items():
            parameter.copy_(policy.ema.tensors[name])
    assert torch.equal(logps(policy), scored)


@pytest.mark.parametrize("distributed", [False, True], ids=["plain optimizer", "distributed optimizer"])
def test_a_moving_average_keeps_what_half_precision_would_lose(make_policy, distributed: bool):
    """Steps below bfloat16's spacing still move a float32 average of the optimizer's float32 masters."""
    section = OptimSection(lr=1e-6, ema_decay=0.5, weight_decay=0.0, clip_grad=0.0)
    policy = make_policy(
        optim=section, parallel={"distributed_optimizer": distributed}, model={"dtype": "bfloat16"}, load_weights=True
    )
    started = {name: tensor.clone() for name, tensor in policy.ema.tensors.items()}
    policy.update(rows(), Likelihood(), lr=1e-6)
    moved = unmoved = 0
    for name, average in policy.ema.tensors.items():
        parameter = policy.parameters[name].detach()
        assert torch.equal(started[name], started[name].bfloat16().float())
        changed = average != started[name]
        # AdamW's first step is the learning rate, up or down; half of it reaches the average.
        step = (average - started[name])[changed].abs()
        assert torch.all((step - 5e-7).abs() <= 1e-7 + 1e-6 * started[name][changed].abs()), name
        moved += int(changed.sum())
        unmoved += int((parameter.float() == started[name])[changed].sum())
    assert moved > 1000
    assert unmoved > 0.9 * moved
