"""Fixtures: each instruction set that this machine has, with the reference for comparison."""

import pytest
import torch

from lowbit import kernels


@pytest.fixture(params=kernels.available_isas())
def isa(request):
    """Run the test under every available implementation, the reference included."""
    with kernels.use_isa(request.param):
        yield request.param


@pytest.fixture
def random():
    return torch.Generator().manual_seed(20240229)
