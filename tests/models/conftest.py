import pytest
from mmengine.registry import DefaultScope


@pytest.fixture(autouse=True)
def mmdets_scope():
    """Types without a prefix are mmdet's, whatever a run in an earlier test has left behind."""
    with DefaultScope.overwrite_default_scope("mmdet"):
        yield
