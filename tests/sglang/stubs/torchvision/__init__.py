"""Stub: SGLang imports torchvision for image models alone, and its wheels are for CUDA builds of torch."""

import enum

__version__ = "0.0.0"
MODES = ("NEAREST", "NEAREST_EXACT", "BILINEAR", "BICUBIC", "BOX", "HAMMING", "LANCZOS")


class _Absent:
    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, *args, **kwargs):
        raise RuntimeError("torchvision is a stub here")


def stand_in(name):
    """Any name a module is asked for: an enum where one is iterated over, else a class that refuses to be called."""
    if name.startswith("__"):
        raise AttributeError(name)
    if name == "InterpolationMode":
        return enum.Enum(name, {mode: mode.lower() for mode in MODES})
    return type(name, (_Absent,), {})


__getattr__ = stand_in
