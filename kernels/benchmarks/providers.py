"""Who is measured: ours in its forms, what one would write in plain torch, and other projects' kernels where installed.

A provider says which statistics it gives and which of them carry a gradient: most peers give less than we do (a
cross-entropy alone), and are shown with what they give.
"""

from __future__ import annotations

import importlib.util
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from cases import Case
from urlvr_kernels import DIFFERENTIABLE, OUTPUTS, lm_head_stats, reference

Statistics = dict[str, torch.Tensor]


class Provider(ABC):
    """One way to the statistics and their gradients."""

    name: str
    gives: tuple[str, ...] = ("logp", "entropy", "self_certainty")
    module: str | None = None
    """Package it needs."""
    gpu_only = False
    gemms = 4
    """Matrix products of a forward and backward, 2 T H V each."""

    def unavailable(self, device: torch.device) -> str | None:
        """Why it cannot run here; None if it can."""
        if self.module is not None and importlib.util.find_spec(self.module.split(".")[0]) is None:
            return f"{self.module.split('.')[0]} is not installed"
        if self.gpu_only and device.type != "cuda":
            return "needs a GPU"
        return None

    @abstractmethod
    def forward(self, case: Case) -> Statistics:
        """The statistics, `[T]` each."""

    @property
    def differentiable(self) -> tuple[str, ...]:
        """What it gives with a gradient."""
        return tuple(name for name in self.gives if name in DIFFERENTIABLE)

    def forward_backward(self, case: Case, of: Sequence[str] | None = None) -> None:
        """Statistics, and the gradients of `sum grads[k] * k` in the case's `.grad`s; k: `of`, or all it can."""
        found = self.forward(case)
        torch.autograd.backward([(found[name] * case.grads[name]).sum() for name in of or self.differentiable])


class GemmFloor(Provider):
    """The bare matrix products: one forward, three forward and backward. No exact method is faster."""

    name = "GEMMs alone"
    gives = ()
    gemms = 3

    def __init__(self) -> None:
        self._logits: torch.Tensor | None = None

    def forward(self, case: Case) -> Statistics:
        shape = (case.shape.tokens, case.shape.vocab)
        if self._logits is None or self._logits.shape != shape:
            self._logits = torch.empty(shape, dtype=case.hidden.dtype, device=case.hidden.device)
        torch.mm(case.hidden.detach(), case.weight.detach().t(), out=self._logits)
        return {}

    def forward_backward(self, case: Case, of: Sequence[str] | None = None) -> None:
        self.forward(case)
        assert self._logits is not None
        case.hidden.grad = torch.mm(self._logits, case.weight.detach())
        case.weight.grad = torch.mm(self._logits.t(), case.hidden.detach())


class Ours(Provider):
    """`lm_head_stats` with given arguments."""

    def __init__(self, name: str, gemms: int, gives: tuple[str, ...] = Provider.gives, **arguments: object) -> None:
        self.name, self.gemms, self.gives, self._arguments = name, gemms, gives, arguments

    def forward(self, case: Case) -> Statistics:
        stats = lm_head_stats(case.hidden, case.weight, case.target, outputs=self.gives, **self._arguments)
        return {name: getattr(stats, name) for name in self.gives}


class OursOnePass(Ours):
    """The one-pass form: gradients known beforehand."""

    def forward_backward(self, case: Case, of: Sequence[str] | None = None) -> None:
        upstream = {name: case.grads[name] for name in of or self.differentiable}
        stats = lm_head_stats(
            case.hidden, case.weight, case.target, outputs=self.gives, upstream=upstream, **self._arguments
        )
        stats.loss.backward()


def materialised(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What one writes without a kernel: logits in the model's type, the rest in float32."""
    log_p = torch.log_softmax((hidden @ weight.t()).float(), -1)
    logp = log_p.gather(1, target[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    return logp, entropy, -log_p.mean(-1) - math.log(weight.shape[0])


class TorchEager(Provider):
    """Materialised logits in eager torch."""

    name = "torch, materialised"
    gemms = 3
    compute: Callable[..., tuple[torch.Tensor, ...]] = staticmethod(materialised)

    def forward(self, case: Case) -> Statistics:
        return dict(zip(self.gives, self.compute(case.hidden, case.weight, case.target), strict=True))


class TorchEverything(Provider):
    """All outputs from materialised logits in eager torch, to be compared in accuracy."""

    name = "torch, materialised"
    gives = OUTPUTS
    gemms = 3

    def forward(self, case: Case) -> Statistics:
        logits = case.hidden @ case.weight.t()
        stats = reference.logits_stats(logits.float(), case.target, outputs=self.gives)
        return {name: getattr(stats, name) for name in self.gives}


class TorchCompiled(TorchEager):
    """The same under torch.compile."""

    name = "torch.compile, materialised"

    def __init__(self) -> None:
        self.compute = torch.compile(materialised, dynamic=False)


class CrossEntropyPeer(Provider):
    """A fused cross-entropy: log-prob alone."""

    gives = ("logp",)
    gemms = 3


class Liger(CrossEntropyPeer):
    """liger-kernel's fused linear cross-entropy; gradients in the forward, so the forward alone is not timed alike."""

    name = "Liger FLCE (logp only)"
    module = "liger_kernel"
    gpu_only = True

    def forward(self, case: Case) -> Statistics:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        out = LigerFusedLinearCrossEntropyFunction.apply(
            case.hidden, case.weight, case.target, None, None, -100, 0.0, 0.0, "none"
        )
        return {"logp": -(out[0] if isinstance(out, tuple) else out)}


class CutCrossEntropy(CrossEntropyPeer):
    """apple/ml-cross-entropy in its exact variant."""

    name = "cut-cross-entropy, cce_exact (logp only)"
    module = "cut_cross_entropy"
    gpu_only = True
    gemms = 4

    def forward(self, case: Case) -> Statistics:
        from cut_cross_entropy import linear_cross_entropy

        return {
            "logp": -linear_cross_entropy(case.hidden, case.weight, case.target, reduction="none", impl="cce_exact")
        }


class Trl(Provider):
    """TRL's log-prob and entropy from materialised logits."""

    name = "TRL, materialised (logp, entropy)"
    module = "trl"
    gives = ("logp", "entropy")
    gemms = 3

    def forward(self, case: Case) -> Statistics:
        from trl.trainer.utils import entropy_from_logits, selective_log_softmax

        logits = case.hidden @ case.weight.t()
        return {"logp": selective_log_softmax(logits, case.target), "entropy": entropy_from_logits(logits)}

    def forward_backward(self, case: Case, of: Sequence[str] | None = None) -> None:
        found = self.forward(case)  # its entropy carries no gradient in every version
        with_gradient = [(found[k] * case.grads[k]).sum() for k in of or self.gives if found[k].requires_grad]
        torch.autograd.backward(with_gradient)


class Verl(Provider):
    """verl's Triton kernel."""

    name = "verl linear_cross_entropy (logp, entropy)"
    module = "verl"
    gives = ("logp", "entropy")
    gpu_only = True
    gemms = 4

    def forward(self, case: Case) -> Statistics:
        from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

        logp, entropy = linear_cross_entropy(case.hidden, case.weight, case.target, 1.0, "none")
        return {"logp": logp, "entropy": entropy}


class Quack(CrossEntropyPeer):
    """QuACK's chunked linear cross-entropy; its loss is a sum, so it has no per-token statistics to compare."""

    name = "QuACK linear CE (sum of logp only)"
    module = "quack"
    gpu_only = True

    def forward(self, case: Case) -> Statistics:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        return {"sum": chunked_linear_cross_entropy(case.hidden, case.weight, case.target, reduction="sum")}

    def forward_backward(self, case: Case, of: Sequence[str] | None = None) -> None:
        self.forward(case)["sum"].backward()


def all_providers(stash_all: int) -> list[Provider]:
    """Everyone, the floor first. stash_all: bytes that hold all logits."""
    return [
        GemmFloor(),
        Ours("ours, recompute", 4, stash_bytes=0),
        Ours("ours, stash", 3, stash_bytes=stash_all),
        OursOnePass("ours, one pass (upstream)", 3),
        TorchEager(),
        TorchCompiled(),
        Liger(),
        CutCrossEntropy(),
        Trl(),
        Verl(),
        Quack(),
    ]
