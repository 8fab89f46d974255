"""Networks of the packages that people take them from, with random weights: pools replaced, run
forward and backward, exported and run by ONNX Runtime at another size.

The packages are no requirement of anything else; ``make test-slow`` installs them.
"""

import importlib

import pytest
import torch
from torch import nn

from mmsoftpool import replace_pooling

from ..common import randn

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def _torchvision(name, **kwargs):
    models = importlib.import_module("torchvision.models")
    return getattr(models, name)(weights=None, **kwargs)


def _transformers(config, **kwargs):
    transformers = importlib.import_module("transformers")
    return transformers.AutoModel.from_config(getattr(transformers, config)(**kwargs))


class Output(nn.Module):
    """A network of transformers or Ultralytics: the first tensor of its output."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        output = self.net(x)
        while not isinstance(output, torch.Tensor):
            output = next(iter(output.values() if isinstance(output, dict) else output))
        return output


# The package, the network, what to replace (None: what replace_pooling takes by itself), and the
# input size of the example; the file is run at a size half as large again.
NETWORKS = {
    "torchvision densenet121": (
        *("torchvision", lambda: _torchvision("densenet121")),
        *(["*", "adaptive_avg_pool2d()"], (3, 64, 64)),
    ),
    "torchvision squeezenet1_1": (
        *("torchvision", lambda: _torchvision("squeezenet1_1")),
        *(["*", "classifier.3"], (3, 64, 80)),
    ),
    "torchvision vgg11": (
        *("torchvision", lambda: _torchvision("vgg11")),
        *(["*", "avgpool"], (3, 64, 96)),
    ),
    "timm resnet26d": (
        *("timm", lambda: importlib.import_module("timm").create_model("resnet26d")),
        *(None, (3, 64, 64)),
    ),
    "timm inception_v3": (
        *("timm", lambda: importlib.import_module("timm").create_model("inception_v3")),
        *("*", (3, 96, 96)),
    ),
    "segmentation_models_pytorch PSPNet": (
        "segmentation_models_pytorch",
        lambda: importlib.import_module("segmentation_models_pytorch").PSPNet(
            "resnet18", encoder_weights=None
        ),
        *(["*", *(f"decoder.psp.blocks.{i}.pool.0" for i in range(1, 4))], (3, 96, 96)),
    ),
    "segmentation_models_pytorch Unet": (
        "segmentation_models_pytorch",
        lambda: importlib.import_module("segmentation_models_pytorch").Unet(
            "resnet18", encoder_weights=None
        ),
        *(None, (3, 64, 64)),
    ),
    "MONAI BasicUNet": (
        "monai",
        lambda: importlib.import_module("monai.networks.nets").BasicUNet(
            spatial_dims=2, features=(8, 8, 16, 16, 16, 8)
        ),
        *(None, (1, 64, 64)),
    ),
    "MONAI DenseNet121 3d": (
        "monai",
        lambda: importlib.import_module("monai.networks.nets").DenseNet121(3, 1, 2),
        *(None, (1, 32, 32, 32)),
    ),
    "transformers ResNet": (
        "transformers",
        lambda: Output(
            _transformers(
                "ResNetConfig", hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1], embedding_size=8
            )
        ),
        *(None, (3, 64, 64)),
    ),
    "transformers EfficientNet": (  # its last pool has a kernel larger than any map
        "transformers",
        lambda: Output(
            _transformers(
                "EfficientNetConfig", width_coefficient=0.25, depth_coefficient=0.5, hidden_dim=320
            )
        ),
        *(None, (3, 64, 64)),
    ),
    "Ultralytics yolov3-tiny": (
        "ultralytics",
        lambda: Output(importlib.import_module("ultralytics").YOLO("yolov3-tiny.yaml").model),
        *(None, (3, 64, 96)),
    ),
    "Ultralytics yolo11n": (
        "ultralytics",
        lambda: Output(importlib.import_module("ultralytics").YOLO("yolo11n.yaml").model),
        *(None, (3, 64, 96)),
    ),
    "pytorchcv xception": (
        *("pytorchcv", lambda: _pytorchcv("xception")),
        *(None, (3, 96, 96)),
    ),
    "pytorchcv dpn68": (
        *("pytorchcv", lambda: _pytorchcv("dpn68")),
        *(None, (3, 64, 64)),
    ),
}


def _pytorchcv(name):
    provider = importlib.import_module("pytorchcv.model_provider")
    # Their heads pool a map of one size; all but them take any.
    return provider.get_model(name, pretrained=False).features[:-1]


# Not exported with dynamic sizes, and why. The rest of the test holds for them, too.
FIXED_SIZE = {
    "transformers EfficientNet": "slices for 64 x 64 taps and more are refused by name",
    "Ultralytics yolov3-tiny": "its head keeps the example's batch and anchors",
    "Ultralytics yolo11n": "its head keeps the example's batch and anchors",
    "MONAI BasicUNet": "it branches on sizes",
    "segmentation_models_pytorch PSPNet": "it refuses other sizes while it is traced",
}


@pytest.mark.parametrize("name", NETWORKS)
def test_replaced_run_differentiated_and_exported(name, tmp_path):
    package, build, include, size = NETWORKS[name]
    pytest.importorskip(package, reason=f"make test-slow installs {package}")
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    net = build()
    with torch.no_grad():  # some are initialised with zeros
        for parameter in net.parameters():
            if parameter.dim() > 1:
                nn.init.kaiming_normal_(parameter)
    before = sum(p.numel() for p in net.parameters())
    x = randn(2, *size)
    shape = net.eval()(x).shape
    replaced = replace_pooling(net, include=include)
    assert replaced and sum(p.numel() for p in net.parameters()) == before
    y = net(x)
    assert y.shape == shape and y.isfinite().all()
    net.zero_grad()
    y.square().mean().backward()
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    assert gradients and all(grad.isfinite().all() for grad in gradients)

    path = str(tmp_path / "net.onnx")
    dynamic = dict.fromkeys((0, *range(2, x.dim())), torch.export.Dim.DYNAMIC)
    torch.onnx.export(
        *(net, (x,), path),
        dynamo=True,
        dynamic_shapes=None if name in FIXED_SIZE else (dynamic,),
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path)
    if name not in FIXED_SIZE:
        x = randn(1, size[0], *(side * 3 // 2 for side in size[1:]), seed=1)
    (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})[:1]
    with torch.no_grad():
        expected = net(x)
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(torch.from_numpy(result), expected, rtol=0, atol=1e-3 * scale)
