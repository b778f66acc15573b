"""The Megatron-Core policy. Importing anything of it prepares Megatron for machines without CUDA (`cpu.py`)."""

from . import cpu

cpu.install()
