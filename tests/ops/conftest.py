import pytest
import torch

from mmsoftpool.ops import backends, reference


@pytest.fixture(params=["compiled", "reference"])
def backend(request):
    """Runs a test twice: on the compiled kernels and on the reference in plain PyTorch."""
    if request.param == "compiled":
        yield request.param
        return
    scoped = torch.library.Library("mmsoftpool", "IMPL")
    scoped.impl("soft_pool", reference.soft_pool, "CPU", **backends.OVERRIDE)
    scoped.impl("soft_pool_backward", reference.soft_pool_backward, "CPU", **backends.OVERRIDE)
    yield request.param
    del scoped
