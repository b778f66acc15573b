"""The exponential moving average of the policy's weights, of the float32 masters that the optimizer steps.

A rank averages what it steps: with a distributed optimizer a part of its parameters, which all its data-parallel ranks
hold together. What is scored or saved is put together from their parts, so that it is the same on all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from .optimizer import PolicyOptimizer
from .weights import swapped


@dataclass(frozen=True)
class _Part:
    """The part of a parameter whose master this rank steps."""

    start: int
    """First entry of the flattened parameter."""
    master: torch.Tensor
    """The master itself."""
    average: torch.Tensor
    """float32, flat, in host memory."""


class MovingAverage:
    """average = decay * average + (1 - decay) * masters, after every step. Memory: 4 bytes of the host for each entry
    whose master this rank steps. What is not said otherwise is collective over data-parallel ranks."""

    def __init__(
        self, parameters: Mapping[str, torch.nn.Parameter], optimizer: PolicyOptimizer, *, decay: float
    ) -> None:
        """Begin with the masters as they are. `parameters`: this rank's, by name."""
        self.decay = decay
        self._parameters = dict(parameters)
        stepped = {parameter: (start, master) for parameter, start, master in _masters(optimizer, parameters)}
        self._parts = {
            name: _Part(start, master, _flat(master).clone())
            for name, parameter in parameters.items()
            if parameter in stepped
            for start, master in [stepped[parameter]]
        }
        self._groups = {parameter: part.data_parallel_group for part in _sharded(optimizer) for parameter in _of(part)}

    @torch.no_grad()
    def track(self) -> None:
        """One step of the recursion. Not collective."""
        for part in self._parts.values():
            part.average.lerp_(_flat(part.master), 1 - self.decay)

    def swapped_into(self, parameters: Mapping[str, torch.nn.Parameter]) -> AbstractContextManager[None]:
        """Run with the averages in the model; the policy's own weights come back bit for bit."""
        return swapped(parameters, self.whole)

    def whole(self, name: str) -> torch.Tensor:
        """The average of one parameter, float32, on the parameter's device: the same bits on every rank."""
        parameter, part = self._parameters[name], self._parts.get(name)
        found = torch.zeros(parameter.numel(), device=parameter.device)
        if part is not None:
            found[part.start : part.start + part.average.numel()] = part.average.to(parameter.device)
        if (group := self._groups.get(parameter)) is not None:
            dist.all_reduce(found, group=group)  # every entry is one rank's: the sum is a copy
        return found.view(parameter.shape)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All averages whole, in host memory."""
        return {name: self.whole(name).cpu() for name in self._parameters}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take this rank's parts of whole averages. Not collective."""
        for name, part in self._parts.items():
            part.average.copy_(tensors[name].flatten()[part.start : part.start + part.average.numel()])


def _masters(
    optimizer: PolicyOptimizer, parameters: Mapping[str, torch.nn.Parameter]
) -> Iterator[tuple[torch.nn.Parameter, int, torch.Tensor]]:
    """(parameter, first entry, master) of what this rank steps."""
    if not optimizer.distributed:
        for parameter in parameters.values():
            yield parameter, 0, getattr(parameter, "main_param", parameter)
        return
    for part in _sharded(optimizer):
        groups = [
            *zip(part.model_float16_groups, part.shard_fp32_from_float16_groups, strict=True),
            *zip(part.model_fp32_groups, part.shard_fp32_groups, strict=True),
        ]
        for models, shards in groups:
            for parameter, shard in zip(models, shards, strict=True):
                yield parameter, part._get_model_param_range_map(parameter)["param"].start, shard


def _flat(master: torch.Tensor) -> torch.Tensor:
    return master.detach().float().cpu().view(-1)


def _sharded(optimizer: PolicyOptimizer) -> list[Any]:
    """Megatron's distributed optimizers, one for each set of data-parallel ranks."""
    return optimizer.parts if optimizer.distributed else []


def _of(part: Any) -> Iterator[torch.nn.Parameter]:
    """All parameters whose masters are spread over the ranks of a distributed optimizer."""
    for buffer in part.buffers:
        yield from buffer.params
