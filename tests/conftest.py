"""What all tests share."""

import os
from collections.abc import Iterator
from unittest import mock

import pytest
from hypothesis import settings

settings.register_profile("steady", deadline=None)  # a busy machine is no fault of the code
settings.load_profile("steady")


@pytest.fixture(autouse=True)
def _environment_of_its_own() -> Iterator[None]:
    """No test sees the servers' key of its caller, nor a variable that another test left behind."""
    with mock.patch.dict(os.environ):
        os.environ.pop("URLVR_API_KEY", None)
        yield
