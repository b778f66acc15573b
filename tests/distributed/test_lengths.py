"""Rows of very different lengths, in every layout, against one process: evened out over replicas and micro-batches.

The long responses are the odd replicas' own.
"""

import pytest
import torch
from length_cases import BUDGET, CLIP, SeenLengths, model_of, skewed_groups
from safetensors.torch import load_file
from test_layouts import STATISTIC, assert_close_gradients, assert_same_bits

pytestmark = pytest.mark.timeout(600)  # the first test of a group waits for its processes
WEIGHT = 1e-5
"""Absolute, after steps of up to 1e-3 each."""
LAYOUTS = (
    "dp2",
    "dp2_ep2",
    "cp2_ep2",
    "pp2",
    "pp2_unpadded",
    "pp2_vpp2",
    "pp2_vpp2_unpadded",
    "dp4",
    "pp2_dp2",
    "tp2_dp2_ep2",
)


@pytest.fixture(scope="module", params=LAYOUTS)
def layout_of_lengths(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def ranks(layout_of_lengths: str, lengths_seen) -> list[SeenLengths]:
    """What each rank saw."""
    return lengths_seen(layout_of_lengths)


@pytest.fixture(scope="module")
def one(layout_of_lengths: str, lengths_alone) -> SeenLengths:
    """What one process sees with the same model."""
    return lengths_alone(layout_of_lengths)


def test_log_probs_come_back_to_the_replica_whose_rows_they_are(ranks: list[SeenLengths], one: SeenLengths):
    groups = [k for rank in {seen.replica: seen for seen in ranks}.values() for k in rank.logp]
    assert sorted(groups) == list(range(len(skewed_groups())))
    for seen in ranks:
        for k, found in seen.logp.items():
            for mine, expected in zip(found, one.logp[k], strict=True):
                assert mine.shape == expected.shape
                assert (mine - expected).abs().max() < STATISTIC


def test_weights_that_were_loaded_are_exported_bit_for_bit_on_every_rank(
    ranks: list[SeenLengths], layout_of_lengths: str, cases, families
):
    folder = {"tied": cases["tied"].model, **families}[model_of(layout_of_lengths)]
    for seen in ranks:
        assert_same_bits(seen.exported, load_file(folder / "model.safetensors"))


def test_losses_gradients_and_weights_are_those_of_one_process(ranks: list[SeenLengths], one: SeenLengths):
    for seen in ranks:
        assert_close_gradients(seen.gradients, one.gradients)
        for found, expected in zip(seen.metrics, one.metrics, strict=True):
            for name, value in expected.items():
                assert found[name] == pytest.approx(value, rel=1e-4), name
        for name, tensor in seen.weights.items():
            assert (tensor - one.weights[name]).abs().max() < WEIGHT, name
        assert_same_bits(seen.weights, ranks[0].weights)


def test_replicas_are_even_where_one_half_had_all_long_rows(
    ranks: list[SeenLengths], layout_of_lengths: str, one: SeenLengths
):
    if "dp" not in layout_of_lengths:
        assert not any(name.startswith("balance/") for seen in ranks for each in seen.metrics for name in each)
        return
    first = ranks[0].metrics[0]
    assert first["balance/before"] > 1.7
    assert first["balance/after"] < 1.05
    assert 0.1 < first["balance/moved"] < 0.6
    assert all(seen.metrics == ranks[0].metrics for seen in ranks)
    totals = {seen.replica: sum(used for used, _ in seen.lengths) for seen in ranks}
    assert max(totals.values()) < 1.1 * sum(totals.values()) / len(totals)
    assert len({len(seen.lengths) for seen in ranks}) == 1


def test_a_pipelines_micro_batches_have_one_length_and_little_padding(
    ranks: list[SeenLengths], layout_of_lengths: str, one: SeenLengths
):
    assert len({used for used, _ in one.lengths}) > 5
    if layout_of_lengths.endswith("unpadded"):
        assert all(length == used + 1 for seen in ranks for used, length in seen.lengths)
        assert all(len(set(seen.lengths)) > 5 for seen in ranks)
    if layout_of_lengths not in ("pp2", "pp2_vpp2", "pp2_dp2"):
        return
    for seen in ranks:
        (length,) = {length for _, length in seen.lengths}
        assert length <= max(BUDGET, *(used for used, _ in one.lengths)) + 1
        assert sum(used for used, _ in seen.lengths) > 0.8 * length * len(seen.lengths)


def test_skewed_log_probs_are_not_alike_and_gradients_are_clipped(one: SeenLengths):
    """What is compared could tell rows, and steps, apart."""
    firsts = torch.stack([found[0][0] for found in one.logp.values()])
    assert len(set(firsts.tolist())) == len(firsts)
    assert all(metrics["train/grad_norm"] > CLIP for metrics in one.metrics)
    assert all((one.weights[name] - tensor).abs().max() > 10 * WEIGHT for name, tensor in one.exported.items())
