"""Networks of the packages that people take them from, with random weights: pools replaced, run
forward and backward, traced, exported and run by ONNX Runtime at another size.

What is seen here is the table of docs/backbones.md: a test fails where its row is another. The
packages are no requirement of anything else; ``make test-slow`` installs them.
"""

import copy
import functools
import importlib
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from mmsoftpool import replace_pooling

from ..common import randn

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
PAGE = Path(__file__).parents[2] / "docs" / "backbones.md"


@torch.fx.wrap
def first_tensor(output):
    while not isinstance(output, torch.Tensor):
        output = next(iter(output.values() if isinstance(output, dict) else output))
    return output


class Output(nn.Module):
    """A network whose output is a structure: the first tensor in it."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return first_tensor(self.net(x))


def torchvision(name, **kwargs):
    path, _, name = name.rpartition(".")
    models = importlib.import_module(f"torchvision.models.{path}".rstrip("."))
    return getattr(models, name)(weights=None, **kwargs)


def timm(name):
    return importlib.import_module("timm").create_model(name)


def smp(name):
    models = importlib.import_module("segmentation_models_pytorch")
    return getattr(models, name)("resnet18", encoder_weights=None)


def monai(name, *args, **kwargs):
    return getattr(importlib.import_module("monai.networks.nets"), name)(*args, **kwargs)


def transformers(name, model="AutoModel", **kwargs):
    package = importlib.import_module("transformers")
    config = getattr(package, name + "Config")(**kwargs)
    return Output(getattr(package, model).from_config(config))


def ultralytics(name):
    return Output(importlib.import_module("ultralytics").YOLO(name).model)


def pytorchcv(name):
    provider = importlib.import_module("pytorchcv.model_provider")
    # Their heads pool a map of one size; all but them take any.
    return provider.get_model(name, pretrained=False).features[:-1]


def detr():
    package = importlib.import_module("transformers")
    backbone = package.ResNetConfig(**SMALL_RESNET, out_features=["stage4"])
    return transformers(
        *("Detr", "AutoModel"),
        **dict(use_timm_backbone=False, backbone=None, backbone_config=backbone, d_model=32),
        **dict(use_pretrained_backbone=False, encoder_layers=1, decoder_layers=1),
        **dict(encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=5),
    )


def rt_detr():
    package = importlib.import_module("transformers")
    backbone = package.RTDetrResNetConfig(
        hidden_sizes=[8, 16, 32, 64],
        depths=[1, 1, 1, 1],
        embedding_size=8,
        out_features=["stage2", "stage3", "stage4"],
        layer_type="basic",
    )
    return transformers(
        *("RTDetr", "AutoModel"),
        **dict(backbone_config=backbone, encoder_in_channels=[16, 32, 64], d_model=32),
        **dict(encoder_hidden_dim=32, encoder_ffn_dim=32, decoder_ffn_dim=32, decoder_layers=1),
        **dict(decoder_in_channels=[32, 32, 32], num_queries=5, anchor_image_size=None),
    )


def fpn():
    detection = importlib.import_module("torchvision.models.detection.backbone_utils")
    return Output(detection.resnet_fpn_backbone(backbone_name="resnet18", weights=None))


SMALL_RESNET = dict(hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1], embedding_size=8)
GLOBAL = "adaptive_avg_pool2d()"
# What builds the network, what to replace (None: what replace_pooling takes by itself), and the
# input size of the example; it is run at a size half as large again.
NETWORKS = {
    "torchvision ResNet-18": (lambda: torchvision("resnet18"), None, (3, 64, 64)),
    "torchvision DenseNet-121": (lambda: torchvision("densenet121"), ["*", GLOBAL], (3, 64, 64)),
    "torchvision GoogLeNet": (
        lambda: torchvision("googlenet", init_weights=False, aux_logits=False),
        *(None, (3, 64, 64)),
    ),
    "torchvision SqueezeNet 1.1": (
        lambda: torchvision("squeezenet1_1"),
        *(["*", "classifier.3"], (3, 64, 80)),
    ),
    "torchvision ShuffleNet v2": (lambda: torchvision("shufflenet_v2_x0_5"), None, (3, 64, 64)),
    "torchvision VGG-11": (lambda: torchvision("vgg11").features, None, (3, 64, 96)),
    "torchvision Faster R-CNN (ResNet-18 FPN)": (fpn, "*", (3, 128, 128)),
    "torchvision DeepLabv3 (ResNet-50)": (
        lambda: Output(torchvision("segmentation.deeplabv3_resnet50", weights_backbone=None)),
        *(["*", "net.classifier.0.convs.4.0"], (3, 64, 64)),
    ),
    "torchvision S3D": (lambda: torchvision("video.s3d").features, None, (3, 16, 64, 64)),
    "timm ResNet-26-D": (lambda: timm("resnet26d"), None, (3, 64, 64)),
    "timm Inception v3": (lambda: timm("inception_v3"), "*", (3, 128, 128)),
    "timm DLA-34": (lambda: timm("dla34"), None, (3, 64, 64)),
    "timm VoVNet": (lambda: timm("ese_vovnet19b_dw"), None, (3, 64, 64)),
    "timm ResNeSt-14-D": (lambda: timm("resnest14d"), None, (3, 64, 64)),
    "timm SK-ResNet-18": (lambda: timm("skresnet18"), None, (3, 64, 64)),
    "timm CSPResNet-50": (lambda: timm("cspresnet50"), None, (3, 64, 64)),
    "timm PoolFormer-S12": (lambda: timm("poolformer_s12"), None, (3, 64, 64)),
    "segmentation_models_pytorch U-Net": (lambda: smp("Unet"), None, (3, 64, 64)),
    "segmentation_models_pytorch PSPNet": (
        lambda: smp("PSPNet"),
        *(["*", *(f"decoder.psp.blocks.{i}.pool.0" for i in range(1, 4))], (3, 96, 96)),
    ),
    "MONAI BasicUNet": (
        lambda: monai("BasicUNet", spatial_dims=2, features=(8, 8, 16, 16, 16, 8)),
        *(None, (1, 64, 64)),
    ),
    "MONAI ResNet-10, 3d": (
        lambda: monai("resnet10", spatial_dims=3, n_input_channels=1),
        *(None, (1, 32, 32, 32)),
    ),
    "MONAI DenseNet-121, 3d": (lambda: monai("DenseNet121", 3, 1, 2), None, (1, 32, 32, 32)),
    "transformers ResNet": (
        lambda: transformers("ResNet", **SMALL_RESNET),
        *(None, (3, 64, 64)),
    ),
    "transformers DETR": (detr, None, (3, 64, 64)),
    "transformers RT-DETR": (rt_detr, None, (3, 64, 64)),
    "Ultralytics YOLOv3-tiny": (lambda: ultralytics("yolov3-tiny.yaml"), None, (3, 64, 128)),
    "Ultralytics YOLOv8n": (lambda: ultralytics("yolov8n.yaml"), None, (3, 64, 128)),
    "Ultralytics YOLO11n": (lambda: ultralytics("yolo11n.yaml"), None, (3, 64, 128)),
    "pytorchcv Xception": (lambda: pytorchcv("xception"), None, (3, 96, 96)),
}
# Without a pool but a global one, which stays unless it is named.
NO_POOLS = {
    "torchvision Swin": lambda: torchvision("swin_t"),
    "torchvision ViT": lambda: torchvision("vit_b_32"),
    "torchvision ConvNeXt": lambda: torchvision("convnext_tiny"),
    "torchvision EfficientNet": lambda: torchvision("efficientnet_b0"),
    "torchvision MobileNetV3": lambda: torchvision("mobilenet_v3_small"),
    "torchvision RegNet": lambda: torchvision("regnet_y_400mf"),
    "torchvision R3D, R(2+1)D": lambda: torchvision("video.r3d_18"),
    "timm Swin": lambda: timm("swin_tiny_patch4_window7_224"),
    "timm ViT": lambda: timm("vit_tiny_patch16_224"),
    "timm ConvNeXt": lambda: timm("convnext_atto"),
    "timm EfficientNet": lambda: timm("efficientnet_b0"),
    "timm MobileNetV3": lambda: timm("mobilenetv3_small_050"),
    "timm RegNet": lambda: timm("regnety_002"),
    "timm HRNet": lambda: timm("hrnet_w18_small"),
    "timm RepVGG": lambda: timm("repvgg_a0"),
    "MONAI UNet": lambda: monai("UNet", 2, 1, 2, (8, 16), (2,)),
    "MONAI SegResNet": lambda: monai("SegResNet"),
    "transformers Swin": lambda: transformers("Swin"),
    "transformers SegFormer": lambda: transformers("Segformer"),
}


def built(build):
    try:
        return build()
    except ModuleNotFoundError as error:
        pytest.skip(f"make test-slow installs {error.name}")


def table():
    """The rows of the table in the documentation, by network."""
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    return {name: cells.split(" | ") for name, cells in rows if name in NETWORKS}


def close(result, expected, tolerance):
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(result, expected, rtol=0, atol=tolerance * scale)


def traced(net, x):
    with torch.no_grad():
        close(torch.fx.symbolic_trace(net)(x), net(x), 1e-5)


@functools.lru_cache(maxsize=1)
def exported(net, x, x2):
    dynamic = dict.fromkeys((0, *range(2, x.dim())), torch.export.Dim.AUTO)
    program = torch.export.export(net, (x,), dynamic_shapes=(None if x2 is x else dynamic,))
    with torch.no_grad():
        close(program.module()(x2), net(x2), 1e-4)
    return program


def run_by_onnx_runtime(net, x, x2, path):
    session_of = pytest.importorskip("onnxruntime").InferenceSession
    torch.onnx.export(exported(net, x, x2), (), path, dynamo=True, verbose=False)
    session = session_of(path)
    (result, *_) = session.run(None, {session.get_inputs()[0].name: x2.numpy()})
    with torch.no_grad():
        close(torch.from_numpy(result), net(x2), 1e-3)


def works(check, net, original, *args):
    """Whether a check passes. Where it does not, it must fail with the network's own pools too."""
    try:
        check(net, *args)
    except Exception as error:
        print(f"{check.__name__}: {type(error).__name__}: {str(error)[:1000]}")
        with pytest.raises(Exception):  # noqa: B017 (the packages raise anything)
            check(original, *args)
        return False
    return True


@pytest.mark.parametrize("name", NETWORKS)
def test_replaced_run_differentiated_and_exported(name, tmp_path):
    build, include, size = NETWORKS[name]
    torch.manual_seed(0)
    net = built(build).eval()
    with torch.no_grad():  # some are initialised with zeros
        for parameter in net.parameters():
            if parameter.dim() > 1:
                nn.init.kaiming_normal_(parameter)
    original = copy.deepcopy(net)
    before = sum(p.numel() for p in net.parameters())
    x = randn(2, *size)
    x2 = randn(3, size[0], *(side * 3 // 2 for side in size[1:]), seed=1)
    shapes = net(x).shape, net(x2).shape
    replaced = replace_pooling(net, include=include)
    assert sum(p.numel() for p in net.parameters()) == before
    y = net(x)
    assert (y.shape, net(x2).shape) == shapes and y.isfinite().all()
    assert not torch.allclose(y, original(x))
    net.zero_grad()
    y.square().mean().backward()
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    assert gradients and all(grad.isfinite().all() for grad in gradients)
    net.zero_grad()

    functional = sum(name.endswith("()") for name in replaced)
    pools = str(len(replaced) - functional) + (f" and {functional} functional" * bool(functional))
    fx = "yes" if works(traced, net, original, x) else "no"
    cells = [pools, fx]
    for check, args in ((exported, ()), (run_by_onnx_runtime, (str(tmp_path / "net.onnx"),))):
        if works(check, net, original, x, x2, *args):
            cells.append("any size")
        else:
            cells.append("one size" if works(check, net, original, x, x, *args) else "no")
    print("ROW", f"| {name} | {' | '.join(cells)} |")
    assert table().get(name) == cells


@pytest.mark.parametrize("name", NO_POOLS)
def test_nothing_to_replace(name):
    net = built(NO_POOLS[name])
    with pytest.raises(ValueError, match="no pool to replace"):
        replace_pooling(net)
    package, _, network = name.partition(" ")
    (line,) = re.findall(rf"^- \*\*{package}\*\*: (.+)$", PAGE.read_text(), re.MULTILINE)
    assert network in line
