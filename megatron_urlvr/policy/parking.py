"""Tensors that leave their device for a while: its memory is free meanwhile, and they come back bit for bit.

Whole storages move, so that every view of a tensor is good again afterwards. Meanwhile there is nothing to read in it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


class Parking:
    """What is parked in host memory, page-locked where the device is CUDA's."""

    def __init__(self) -> None:
        self._parked: list[tuple[torch.UntypedStorage, torch.Tensor]] = []

    def park(self, tensors: Iterable[torch.Tensor]) -> None:
        """Move the storages behind `tensors` into host memory, each once. What is parked already stays so."""
        for storage in {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}.values():
            if storage.nbytes():
                held = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=storage.device.type == "cuda")
                held.copy_(_bytes_of(storage))
                storage.resize_(0)
                self._parked.append((storage, held))

    def bring_back(self) -> None:
        """Give all of them their memory and contents again."""
        for storage, held in self._parked:
            storage.resize_(held.numel())
            _bytes_of(storage).copy_(held)
        self._parked.clear()


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
