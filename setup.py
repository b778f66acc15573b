"""Builds the two packages of this distribution; all metadata stands in pyproject.toml.

`urlvr_kernels` lives in `kernels/` so that it can also be installed alone (see `kernels/pyproject.toml`).
`kernels/` itself is never a package: that name belongs to the Hugging Face library of the same name.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["megatron_urlvr", "megatron_urlvr.*"]),
        *(f"urlvr_kernels{'.' + name if name else ''}" for name in ["", *find_packages("kernels/urlvr_kernels")]),
    ],
    package_dir={"megatron_urlvr": "megatron_urlvr", "urlvr_kernels": "kernels/urlvr_kernels"},
    package_data={"megatron_urlvr": ["**/*.j2", "py.typed"], "urlvr_kernels": ["py.typed"]},
)
