"""Direct minimisation through the policy: its gradients against autograd on the transformers model, in one pass."""

import math

import pytest
import torch
from gradients import policy_gradients, relative_differences, weigh_equally
from tiny_models import hf_logits, hf_model, random_rows

from megatron_urlvr.algorithms.direct import build_objective
from megatron_urlvr.config.algorithm import DirectSection, KLSection, RLSCSection
from megatron_urlvr.config.optim import OptimSection

VOCAB = 29
FROZEN = OptimSection(lr=1e-3, clip_grad=0.0)


@pytest.mark.parametrize("name", ["em_ft", "self_certainty", "rlsc"])
@pytest.mark.parametrize("base", ["untied", "tied"])
def test_gradients_of_a_direct_loss_are_autograds(make_policy, folders, name: str, base: str) -> None:
    rows = random_rows(12, vocab=VOCAB)
    weigh_equally(rows)
    model = hf_model(folders[base])
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        logp = hf_logits(model, row).log_softmax(-1).double()
        chosen = logp.gather(1, torch.tensor(list(row.response))[:, None])[:, 0]
        row.advantage = 1.0
        if name == "rlsc":
            row.advantage = float(chosen.detach().sum().exp()) + 0.1
        value = {
            "em_ft": -(logp.exp() * logp).sum(-1),
            "self_certainty": logp.mean(-1) + math.log(logp.shape[-1]),
            "rlsc": -row.advantage * chosen,
        }[name]
        assert row.weight is not None
        total = total + (row.weight.double() * value).sum()
    total.backward()
    expected = {key: parameter.grad for key, parameter in model.named_parameters()}
    policy = make_policy(base, optim=FROZEN)
    section = RLSCSection() if name == "rlsc" else DirectSection.model_validate({"name": name})
    metrics = policy.update(rows, build_objective(section, KLSection()), lr=0.0)
    assert metrics["train/loss"] == pytest.approx(float(total.detach()), rel=1e-5)
    assert max(relative_differences(policy_gradients(policy), expected).values()) < 1e-5
