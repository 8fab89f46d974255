"""Exported detectors: standard operators, PyTorch's outputs for any batch and image size."""

import re

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS, init_default_scope

from mmsoftpool import export
from mmsoftpool.config import load_config

from .common import randn

CONFIGS = {
    "retinanet": "configs/demo/demo_retinanet_softpool.py",
    "mask_rcnn": "configs/mask_rcnn_r50_softpool.py",
}
# A small variant with the same structure.
SMALL = {
    "mask_rcnn": {
        "model.backbone.depth": 18,
        "model.backbone.base_channels": 8,
        "model.neck.in_channels": [8, 16, 32, 64],
    }
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Saves random weights of one of the configs; returns the config and the checkpoint."""

    def save(name):
        cfg = load_config(CONFIGS[name], SMALL.get(name))
        init_default_scope("mmdet")
        torch.manual_seed(0)
        detector = MODELS.build(cfg.model)
        path = tmp_path_factory.mktemp(name) / "epoch_1.pth"
        torch.save({"state_dict": detector.state_dict(), "meta": {}}, path)
        return cfg, str(path)

    return save


RETINANET = [f"{name}_{level}" for name in ("cls_score", "bbox_pred") for level in range(4)]


def test_the_tool_writes_onnx_that_onnxruntime_runs(run_tool, checkpoint):
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    cfg, path = checkpoint("retinanet")
    status, out, _ = run_tool("export", CONFIGS["retinanet"], path, "--format", "onnx")
    assert status == 0
    file = path.replace(".pth", ".onnx")
    difference = re.search(rf"wrote {re.escape(file)} .* from PyTorch ([\d.e-]+)", out)[1]
    assert 0 < float(difference) <= 1e-4
    graph = onnx.load(file).graph
    assert {node.domain for node in graph.node} == {""}
    assert [output.name for output in graph.output] == RETINANET
    shape = [dim.dim_param or dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim]
    assert shape == ["batch", 3, "height", "width"]
    session = onnxruntime.InferenceSession(file)
    network = export.build_network(cfg, path)
    image = randn(4, 3, 160, 224, seed=2)
    with torch.no_grad():
        outputs = session.run(None, {"image": image.numpy()})
        for got, expected in zip(outputs, network(image), strict=True):
            np.testing.assert_allclose(got, expected.numpy(), rtol=0, atol=1e-4)


def test_pt2_keeps_the_operator_and_the_backbone_alone_has_features(checkpoint, tmp_path):
    cfg, path = checkpoint("retinanet")
    file = str(tmp_path / "backbone.pt2")
    assert export.export(export.build_network(cfg, path, backbone=True), "pt2", file) <= 1e-4
    program = torch.export.load(file)
    assert torch.ops.mmsoftpool.soft_pool.default in [node.target for node in program.graph.nodes]
    image = randn(1, 3, 97, 65)
    with torch.no_grad():
        features = program.module()(image)
    shapes = [(1, 32 * 2**i, -(-97 // 4 // 2**i), -(-65 // 4 // 2**i)) for i in range(4)]
    assert [tuple(level.shape) for level in features] == shapes
    backbone = export.build_network(cfg, path).backbone
    for got, expected in zip(features, backbone(image), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_a_two_stage_detector_up_to_its_rpn(checkpoint, tmp_path):
    cfg, path = checkpoint("mask_rcnn")
    network = export.build_network(cfg, path)
    assert list(network.outputs(torch.zeros(1, 3, 160, 160))) == [
        f"{name}_{level}"
        for name in ("feature", "rpn_cls_score", "rpn_bbox_pred")
        for level in range(5)
    ]
    assert export.export(network, "pt2", str(tmp_path / "mask_rcnn.pt2")) <= 1e-4


def test_a_file_that_disagrees_is_not_kept(checkpoint, tmp_path, monkeypatch):
    cfg, path = checkpoint("retinanet")
    network = export.build_network(cfg, path, backbone=True)
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(ValueError, match="feature_0 differs from PyTorch for an image of"):
        export.export(network, "pt2", str(tmp_path / "net.pt2"))
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_is_missing_or_of_another_model_is_refused(checkpoint, tmp_path):
    cfg, _ = checkpoint("retinanet")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at /.*missing\.pth"):
        export.build_network(cfg, "missing.pth")
    torch.save({"state_dict": {"x": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not fit the model"):
        export.build_network(cfg, str(tmp_path / "other.pth"))


@pytest.mark.parametrize(
    ("format", "out", "error", "message"),
    [
        ("pt2", "/missing/net.pt2", FileNotFoundError, "no folder /missing to write net.pt2"),
        ("trt", "net.trt", ValueError, "format must be one of onnx, pt2, got 'trt'"),
    ],
)
def test_bad_arguments_are_named(checkpoint, format, out, error, message):
    network = export.build_network(*checkpoint("retinanet"), backbone=True)
    with pytest.raises(error, match=message):
        export.export(network, format, out)


def test_a_network_without_a_detectors_parts_is_refused():
    with pytest.raises(ValueError, match=r"detector must be a single-stage .* got Linear"):
        export.Network(torch.nn.Linear(1, 1))
