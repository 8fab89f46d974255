"""The SoftPool ResNets are mmdet's with another pool in the stem."""

import mmdet.registry
import mmengine.registry
import pytest
import torch
from mmdet.models.backbones import ResNet, ResNetV1d, ResNeXt
from mmengine.runner import load_checkpoint

from mmsoftpool import SoftPool2d, soft_pool2d
from mmsoftpool.models import SoftPoolResNet, SoftPoolResNetV1d, SoftPoolResNeXt

from ..common import randn


@pytest.mark.parametrize("registry", [mmengine.registry.MODELS, mmdet.registry.MODELS])
def test_soft_pool_builds_from_the_registries(registry):
    pool = registry.build(dict(type="SoftPool2d", kernel_size=3, stride=2, padding=1))
    assert type(pool) is SoftPool2d and (pool.kernel_size, pool.stride, pool.padding) == (3, 2, 1)
    for name in ("SoftPool1d", "SoftPool3d"):
        assert type(registry.build(dict(type=name, kernel_size=2))).__name__ == name


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_state_dict_is_that_of_mmdets_resnet(depth):
    ours = mmdet.registry.MODELS.build(dict(type="SoftPoolResNet", depth=depth)).state_dict()
    theirs = ResNet(depth).state_dict()
    assert list(ours) == list(theirs)
    assert all(ours[key].shape == theirs[key].shape for key in ours)


def test_a_checkpoint_of_mmdets_resnet_loads_without_missing_or_unexpected_keys(tmp_path):
    theirs = ResNet(50)
    torch.save(dict(state_dict=theirs.state_dict()), tmp_path / "resnet50.pth")
    ours = SoftPoolResNet(50)
    load_checkpoint(ours, str(tmp_path / "resnet50.pth"), strict=True)
    assert all(v.equal(theirs.state_dict()[k]) for k, v in ours.state_dict().items())
    with_init_cfg = SoftPoolResNet(
        50, init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "resnet50.pth"))
    )
    with_init_cfg.init_weights()
    assert with_init_cfg.layer4[2].conv3.weight.equal(theirs.layer4[2].conv3.weight)


def test_the_default_grid_leaves_the_other_settings_of_the_stem_pool():
    pool = SoftPoolResNet(18, stem_pool=dict(padding=0)).maxpool
    assert pool(randn(1, 2, 7, 7)).shape == (1, 2, 3, 3)  # 4, 4 with the default padding


@pytest.mark.parametrize("deep_stem", [False, True])
@pytest.mark.parametrize(
    ("stem_pool", "args", "alpha"),
    [
        ({}, (3, 2, 1), 1.0),
        (dict(stem_pool=dict(type="SoftPool2d", kernel_size=2, stride=2)), (2, 2), 1.0),
        (dict(stem_pool=dict(type="SoftPool2d", alpha=4.0)), (3, 2, 1), 4.0),  # the default grid
        (dict(stem_pool=dict(alpha=4.0)), (3, 2, 1), 4.0),  # and the default type
    ],
)
def test_forward_is_mmdets_with_the_pool_replaced(deep_stem, stem_pool, args, alpha):
    ours = SoftPoolResNet(18, deep_stem=deep_stem, **stem_pool)
    theirs = ResNet(18, deep_stem=deep_stem)
    for backbone in (ours, theirs):
        backbone.eval()
    theirs.load_state_dict(ours.state_dict())
    theirs.maxpool.forward = lambda x: soft_pool2d(x, *args, alpha=alpha)
    x = randn(2, 3, 64, 96)
    levels = ours(x)
    assert [tuple(level.shape) for level in levels] == [
        (2, 64, 16, 24),
        (2, 128, 8, 12),
        (2, 256, 4, 6),
        (2, 512, 2, 3),
    ]
    for level, other in zip(levels, theirs(x), strict=True):
        torch.testing.assert_close(level, other)


@pytest.mark.parametrize(
    ("ours", "theirs", "args"),
    [
        (SoftPoolResNetV1d, ResNetV1d, dict(depth=50)),
        (SoftPoolResNeXt, ResNeXt, dict(depth=50, groups=32, base_width=4)),
        (SoftPoolResNeXt, ResNeXt, dict(depth=101, groups=32, base_width=8)),
    ],
)
def test_the_family_is_mmdets_with_the_stem_pool_replaced(ours, theirs, args):
    default = mmdet.registry.MODELS.build(dict(type=ours.__name__, **args))
    assert repr(default.maxpool).startswith("SoftPool2d(kernel_size=3, stride=2, padding=1")
    max_pool = dict(type="torch.nn.MaxPool2d", kernel_size=3, stride=2, padding=1)
    with_max_pool = ours(**args, stem_pool=max_pool)
    reference = theirs(**args)
    with_max_pool.load_state_dict(reference.state_dict(), strict=True)
    for backbone in (default, with_max_pool, reference):
        backbone.eval()
    x = randn(1, 3, 32, 32)
    with torch.no_grad():
        for level, other in zip(with_max_pool(x), reference(x), strict=True):
            assert level.equal(other)
        assert not default(x)[0].equal(reference(x)[0])


@pytest.mark.parametrize("name", ["torch.nn.MaxPool2d", torch.nn.MaxPool2d])
def test_torchs_own_pools_can_be_the_stem_pool(name):
    stem_pool = dict(type=name, kernel_size=3, stride=2, padding=1)
    assert type(SoftPoolResNet(18, stem_pool=stem_pool).maxpool) is torch.nn.MaxPool2d


@pytest.mark.parametrize(("frozen_stages", "runs"), [(-1, True), (0, False), (1, False)])
def test_the_pools_backward_runs_only_if_the_stem_trains(frozen_stages, runs):
    backbone = SoftPoolResNet(18, frozen_stages=frozen_stages)
    backbone.train()
    calls = []
    backbone.maxpool.register_full_backward_hook(lambda *_: calls.append(1))
    backbone(randn(1, 3, 64, 64))[-1].sum().backward()
    assert bool(calls) == runs
    assert (backbone.conv1.weight.grad is not None) == runs
