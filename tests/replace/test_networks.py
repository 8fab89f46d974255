"""The networks of the paper (Tables 2, 5, 6 and 7) with their pools replaced."""

import math

import pytest
import timm
import torch
import torchvision.models as tv
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from mmsoftpool import SoftPool2d, SoftPool3d, replace_pooling

from ..common import CLASSIFIERS, randn

DENSENET = ["features.pool0", *(f"features.transition{n}.pool" for n in (1, 2, 3))]
# Network, and which pools are replaced.
NETWORKS = {
    "resnet18": (tv.resnet18, ["maxpool"]),
    "resnet34": (tv.resnet34, ["maxpool"]),
    "resnet50": (tv.resnet50, ["maxpool"]),
    "resnet101": (tv.resnet101, ["maxpool"]),
    "resnet152": (tv.resnet152, ["maxpool"]),
    "densenet121": (tv.densenet121, DENSENET),
    "densenet161": (tv.densenet161, DENSENET),
    "densenet169": (tv.densenet169, DENSENET),
    "resnext50_32x4d": (tv.resnext50_32x4d, ["maxpool"]),
    "resnext101_32x8d": (tv.resnext101_32x8d, ["maxpool"]),
    "wide_resnet50_2": (tv.wide_resnet50_2, ["maxpool"]),
    "inception_v1": (
        lambda: tv.googlenet(aux_logits=False, init_weights=False),
        ["maxpool1", "maxpool2", "inception3a.branch4.0", "inception3b.branch4.0", "maxpool3"]
        + [f"inception4{block}.branch4.0" for block in "abcde"]
        + ["maxpool4", "inception5a.branch4.0", "inception5b.branch4.0"],
    ),
}
# Table 6; each column has the layers of those before it too. There is no mixed 7d.
INCEPTION_V3 = {
    "I": ["Pool1"],
    "II": ["Pool2"],
    "III": ["Mixed_5b.avg_pool2d()", "Mixed_5c.avg_pool2d()", "Mixed_5d.avg_pool2d()"],
    "IV": ["Mixed_6a.max_pool2d()"],
    "V": [f"Mixed_6{block}.avg_pool2d()" for block in "bcde"],
    "VI": ["Mixed_7a.max_pool2d()"],
    "VII": ["Mixed_7b.avg_pool2d()", "Mixed_7c.avg_pool2d()"],
}


def with_stem_pool(build):
    """A 3D ResNet of torchvision with the max pool that the 3D ResNets of Table 7 (Hara et al.,
    CVPR 2018) have in their stem; torchvision's have none."""
    net = build()
    net.stem.append(nn.MaxPool3d(kernel_size=3, stride=2, padding=1))
    return net


NETWORKS_3D = {
    "r3d_18": (lambda: with_stem_pool(tv.video.r3d_18), ["stem.3"]),
    "r2plus1d_18": (lambda: with_stem_pool(tv.video.r2plus1d_18), ["stem.6"]),
    "s3d": (
        tv.video.s3d,
        ["features.1", "features.4", "features.5.branch3.0", "features.6.branch3.0", "features.7"]
        + [f"features.{n}.branch3.0" for n in range(8, 13)]
        + ["features.13", "features.14.branch3.0", "features.15.branch3.0", "avgpool"],
    ),
}


def on_meta(build):
    with torch.device("meta"):
        return build()


def random_weights(net):
    """Memory for a network from the meta device, with He et al.'s weights; faster than its own."""
    net.to_empty(device="cpu")
    for seed, (name, tensor) in enumerate(net.state_dict().items()):
        if tensor.dim() > 1:
            tensor.copy_(randn(*tensor.shape, seed=seed) * math.sqrt(2 / tensor[0].numel()))
        else:
            tensor.fill_(name.endswith(("weight", "running_var")))
    return net


def check_shapes_and_counts(net, size, replace, names, millions=None):
    """Replaces pools and compares shapes, parameters and names; all on the meta device."""
    net.eval()
    x = torch.empty(2, 3, *size, device="meta")
    shape, state = net(x).shape, {k: v.shape for k, v in net.state_dict().items()}
    count = sum(p.numel() for p in net.parameters())
    assert list(replace(net)) == names
    assert net(x).shape == shape
    assert {k: v.shape for k, v in net.state_dict().items()} == state
    assert sum(p.numel() for p in net.parameters()) == count
    if millions:
        assert round(count / 1e6, 1) == millions


def check_forward_and_backward(net, size):
    random_weights(net).train()
    y = net(randn(2, 3, *size))
    y.square().mean().backward()
    assert y.isfinite().all() and y.std() > 0
    assert all(p.grad.isfinite().all() for p in net.parameters())
    first = next(net.parameters())
    assert first.grad.abs().max() > 0


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_tables_2_and_5(name):
    build, names = NETWORKS[name]
    net = on_meta(build)
    check_shapes_and_counts(net, (224, 224), replace_pooling, names, CLASSIFIERS[name])
    assert all(type(net.get_submodule(pool)) is SoftPool2d for pool in names)
    left = {type(module).__name__ for module in net.modules() if "Pool" in type(module).__name__}
    assert left <= {"SoftPool2d", "AdaptiveAvgPool2d"}
    check_forward_and_backward(net, (32, 32))


@pytest.mark.parametrize("column", INCEPTION_V3)
def test_inception_v3_layer_by_layer_as_in_table_6(column):
    """In timm's network the pools inside of the Inception blocks are functional."""
    columns = list(INCEPTION_V3)[: list(INCEPTION_V3).index(column) + 1]
    names = [name for earlier in columns for name in INCEPTION_V3[earlier]]
    net = on_meta(lambda: timm.create_model("inception_v3"))
    check_shapes_and_counts(net, (299, 299), lambda net: replace_pooling(net, include=names), names)
    if column == "VII":
        assert (
            list(replace_pooling(on_meta(lambda: timm.create_model("inception_v3")), include="*"))
            == names
        )
        check_forward_and_backward(net, (80, 80))


def test_every_functional_pool_of_inception_v3_runs_as_soft_pool():
    net = random_weights(on_meta(lambda: timm.create_model("inception_v3"))).eval()
    replace_pooling(net, include="*")
    with torch.no_grad(), torch.profiler.profile() as profile:
        net(randn(1, 3, 80, 80))
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["mmsoftpool::soft_pool"] == 13
    assert not [key for key in calls if "max_pool" in key or key == "aten::avg_pool2d"]


def test_inception_v3_of_mmpretrain_where_all_pools_are_modules():
    from mmpretrain.models.backbones import InceptionV3

    net = on_meta(lambda: InceptionV3(aux_logits=False))
    names = replace_pooling(net)
    assert len(names) == 13 and names.keys() >= {"maxpool1", "maxpool2", "Mixed_7a.branch_pool"}


@pytest.mark.parametrize("name", NETWORKS_3D)
def test_3d_networks_of_table_7(name):
    build, names = NETWORKS_3D[name]
    net = on_meta(build)
    size = (16, 112, 112) if name != "s3d" else (16, 224, 224)
    check_shapes_and_counts(net, size, replace_pooling, names)
    assert all(type(net.get_submodule(pool)) is SoftPool3d for pool in names)
    if name != "s3d":
        check_forward_and_backward(net, (4, 32, 32))


@pytest.mark.parametrize("build", [tv.video.r3d_18, tv.video.r2plus1d_18])
def test_the_global_pool_of_a_3d_network_by_name(build):
    net = on_meta(build)
    with pytest.raises(ValueError, match=r"avgpool \(AdaptiveAvgPool3d\)"):
        replace_pooling(net)
    check_shapes_and_counts(
        net, (16, 112, 112), lambda net: replace_pooling(net, include="avgpool"), ["avgpool"]
    )


# Network, what to replace, and modules whose outputs are extracted.
EXTRACTED = {
    "resnet18": (tv.resnet18, ["maxpool", "avgpool"], ["maxpool", "layer4", "avgpool"]),
    "inception_v3": (
        lambda: timm.create_model("inception_v3"),
        "*",
        ["Pool1", "Mixed_5b", "Mixed_6a", "Mixed_7c"],
    ),
    "torchvision_inception_v3": (
        lambda: tv.inception_v3(init_weights=False, aux_logits=False),
        ["*", "avgpool"],
        ["maxpool1", "Mixed_5b", "Mixed_6a", "Mixed_7c", "avgpool"],
    ),
    "densenet121": (
        tv.densenet121,
        ["*", "adaptive_avg_pool2d()"],
        ["features.pool0", "classifier"],
    ),
}


@pytest.mark.parametrize("name", EXTRACTED)
def test_feature_extraction_with_torch_fx(name):
    build, include, nodes = EXTRACTED[name]
    net = random_weights(on_meta(build))
    replace_pooling(net, include=include)
    outputs = {}
    for node in nodes:
        net.get_submodule(node).register_forward_hook(
            lambda module, args, output, node=node: outputs.update({node: output})
        )
    extractor = create_feature_extractor(net, nodes)
    x = randn(2, 3, 80, 80)
    for training in (True, False):
        net.train(training)(x)
        expected = dict(outputs)
        extracted = extractor.train(training)(x)
        assert list(extracted) == nodes
        assert all(extracted[node].equal(expected[node]) for node in nodes)
