"""What several test modules use. Needs torch alone."""

from pathlib import Path

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
