"""Stub: on a CPU without AMX SGLang runs torch's own operators and merely imports these names."""

__version__ = "0.0.0"


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel is a stub here: {name}")

    return missing
