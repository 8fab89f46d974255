"""What several test modules use. Needs torch and pytest alone."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
#: Real photos and annotations, beside the checkout; tests that use them skip where it is absent.
SHARED = ROOT.parent / "shared"


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal random numbers, the same on every call with the same arguments."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random numbers from 0 to 1, the same on every call with the same arguments."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def since(*version: int):
    """Marks a test of what torch has from a version on."""
    current = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])
    return pytest.mark.skipif(
        version > current, reason="torch {}.{} and later have this".format(*version)
    )
