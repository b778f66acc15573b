"""Transformer Engine's FusedAdam as Megatron-Core sees it, computed by torch: it counts steps in its groups, not in its
states, and saves and loads states of the names that it knows (transformer_engine/pytorch/optimizers/fused_adam.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch


class FusedAdam(torch.optim.Optimizer):
    """AdamW with Transformer Engine's bookkeeping."""

    NAMES = ("exp_avg", "exp_avg_sq", "master_param")

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, adam_w_mode: bool
    ) -> None:
        assert adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            first, second = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                if p.grad is None:
                    continue
                state["exp_avg"].lerp_(p.grad, 1 - first)
                state["exp_avg_sq"].lerp_(p.grad**2, 1 - second)
                mean = state["exp_avg"] / (1 - first ** group["step"])
                spread = (state["exp_avg_sq"] / (1 - second ** group["step"])).sqrt()
                p.sub_(group["lr"] * (mean / (spread + group["eps"]) + group["weight_decay"] * p))

    def state_dict(self) -> dict[str, Any]:
        found = super().state_dict()
        for state in found["state"].values():
            self._known(state)
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for state in self.state.values():
            self._known(state)

    def _known(self, state: dict[str, Any]) -> None:
        for name in state:
            if name not in self.NAMES:
                raise KeyError(name)


def take_fused_adam(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Megatron-Core build optimizers as it does where Transformer Engine is installed."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    monkeypatch.setattr(optimizer, "Adam", FusedAdam)
    monkeypatch.setattr(optimizer, "USING_PYTORCH_OPTIMIZER", False)
    monkeypatch.setattr(distrib_optimizer, "Adam", FusedAdam)
    monkeypatch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", True)
    monkeypatch.setattr(distrib_optimizer, "USING_TE_OPTIMIZER", True)
