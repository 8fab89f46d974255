"""Conversion of checkpoints in the authors' format, synthetic ones from torchvision's networks."""

import os
from collections import OrderedDict

import pytest
import torch
import torchvision
from mmengine.registry import init_default_scope
from torchvision.models.resnet import Bottleneck, ResNet

from mmsoftpool import convert, replace_pooling, soft_pool2d
from mmsoftpool.config import load_config
from mmsoftpool.convert import ARCHITECTURES, WINDOWS, convert_checkpoint

from .common import ROOT, randn


def network(arch):
    """torchvision's network, with statistics that are not the initial ones."""
    torch.manual_seed(0)
    if arch == "resnext101_32x4d":  # torchvision has no function for it
        return ResNet(Bottleneck, [3, 4, 23, 3], groups=32, width_per_group=4)
    net = getattr(torchvision.models, arch)()
    for name, buffer in net.named_buffers():
        if name.endswith(("mean", "var")):
            buffer.uniform_(0.5, 1.5)
    return net


def save(path, net, **settings):
    """Writes what PyTorch's ImageNet example writes."""
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    content = dict(
        epoch=100,
        arch="resnet18",
        state_dict=OrderedDict((f"module.{k}", v) for k, v in net.state_dict().items()),
        best_acc1=torch.tensor(71.27),
        optimizer=optimizer.state_dict(),
    )
    torch.save({**content, **settings}, path)
    return str(path)


@pytest.fixture(scope="module")
def resnet18():
    return network("resnet18")


@pytest.fixture(scope="module")
def theirs(resnet18, tmp_path_factory):
    return save(tmp_path_factory.mktemp("theirs") / "resnet18.pth.tar", resnet18)


def detector(lines, tmp_path):
    """Builds a RetinaNet from the printed lines."""
    path = tmp_path / "config.py"
    path.write_text(f"_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'\n{lines}")
    init_default_scope("mmdet")
    from mmdet.registry import MODELS

    return MODELS.build(load_config(str(path)).model)


@pytest.mark.parametrize(
    ("arch", "windows"),
    [("resnet18", "shifted"), ("resnet18", "aligned"), ("densenet121", "shifted")],
)
def test_the_printed_lines_start_a_detector_from_the_networks_weights(tmp_path, arch, windows):
    net = network(arch)
    theirs = save(tmp_path / "theirs.pth.tar", net, arch=arch)
    lines = convert_checkpoint(theirs, str(tmp_path / "ours.pth"), windows=windows)
    backbone = detector(lines, tmp_path).backbone
    backbone.init_weights()

    replace_pooling(net, WINDOWS[windows])
    features = (
        torch.nn.Sequential(*list(net.children())[:-2]) if arch != "densenet121" else net.features
    )
    for module in (features, backbone):
        module.eval()
    x = randn(1, 3, 64, 64)
    with torch.no_grad():
        expected, level = features(x), backbone(x)[-1]
    if arch == "densenet121":  # torchvision has the last activation in its forward
        expected = expected.relu()
    torch.testing.assert_close(level, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_has_torchvisions_keys_and_shapes(arch):
    # mmpretrain's ResNet, which the wide one is, cannot be made on the meta device.
    with torch.device("cpu" if arch == "wide_resnet50_2" else "meta"):
        net, backbone = network(arch), convert._build(arch)
    theirs = {convert._rename(key): value.shape for key, value in net.state_dict().items()}
    head = {key: theirs.pop(key) for key in ("head.fc.weight", "head.fc.bias")}
    assert theirs == {f"backbone.{k}": value.shape for k, value in backbone.state_dict().items()}
    assert head["head.fc.bias"] == (1000,)


def test_the_file_has_the_weights_and_their_origin(resnet18, theirs, tmp_path):
    convert_checkpoint(theirs, str(tmp_path / "ours.pth"))
    ours = torch.load(tmp_path / "ours.pth", weights_only=True)
    assert ours.keys() == {"meta", "state_dict"}
    meta = ours["meta"]
    assert (meta["source"], meta["arch"], meta["epoch"]) == ("resnet18.pth.tar", "resnet18", 100)
    assert meta["best_acc1"] == pytest.approx(71.27) and meta["windows"] == "shifted"
    assert len(meta["source_sha256"]) == 64 and meta["converted_by"].startswith("mmsoftpool 0")
    names = {k.replace("backbone.", "").replace("head.", "") for k in ours["state_dict"]}
    assert names == set(resnet18.state_dict())
    assert ours["state_dict"]["head.fc.weight"].equal(resnet18.fc.weight)
    assert os.listdir(tmp_path) == ["ours.pth"]


def test_no_key_is_missing_or_unexpected_in_the_retinanet_config(theirs, tmp_path):
    convert_checkpoint(theirs, str(tmp_path / "ours.pth"))
    weights = torch.load(tmp_path / "ours.pth")["state_dict"]
    backbone = {k for k in weights if k.startswith("backbone.")}
    assert {k for k in weights if not k.startswith("backbone.")} == {
        "head.fc.weight",
        "head.fc.bias",
    }
    cfg = load_config(
        str(ROOT / "configs/retinanet_r50_softpool.py"),
        {"model.backbone.depth": 18, "model.neck.in_channels": [64, 128, 256, 512]},
    )
    init_default_scope("mmdet")
    from mmdet.registry import MODELS

    keys = MODELS.build(cfg.model).state_dict()
    assert {k for k in keys if k.startswith("backbone.")} == backbone


@pytest.mark.parametrize(("windows", "first"), [("shifted", -1), ("aligned", 0)])
def test_the_windows_are_those_of_the_training(windows, first):
    """Window p of an axis has the inputs 2p + first and 2p + first + 1 that exist."""
    settings = {k: v for k, v in WINDOWS[windows].items() if k != "type"}
    x = randn(8, 10).double()
    y = soft_pool2d(x[None, None], **settings)[0, 0]
    assert y.shape == (4, 5)
    for p in range(4):
        for q in range(5):
            rows = slice(max(2 * p + first, 0), 2 * p + first + 2)
            columns = slice(max(2 * q + first, 0), 2 * q + first + 2)
            taps = x[rows, columns].flatten()
            torch.testing.assert_close(y[p, q], (taps.softmax(0) * taps).sum(), rtol=0, atol=1e-14)


class TestRefused:
    def refused(self, source, tmp_path, **arguments):
        target = tmp_path / "out" / "ours.pth"
        target.parent.mkdir(exist_ok=True)
        with pytest.raises((ValueError, FileNotFoundError)) as info:
            convert_checkpoint(str(source), str(target), **arguments)
        assert not os.listdir(target.parent)
        assert "\n" not in str(info.value)
        return str(info.value)

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=f"no checkpoint at {tmp_path}/x.pth"):
            convert_checkpoint(str(tmp_path / "x.pth"), str(tmp_path / "ours.pth"))

    @pytest.mark.parametrize("size", [0, 3, 1000, 1_000_000])
    def test_a_truncated_file(self, theirs, tmp_path, size):
        cut = tmp_path / "cut.pth.tar"
        with open(theirs, "rb") as file:
            cut.write_bytes(file.read(size))
        assert f"{cut} is damaged or not a PyTorch checkpoint" in self.refused(cut, tmp_path)

    def test_another_kind_of_file(self, tmp_path):
        (tmp_path / "x.pth").write_text("# a text")
        message = self.refused(tmp_path / "x.pth", tmp_path)
        assert "x.pth is damaged or not a PyTorch checkpoint" in message

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ([1, 2], "state_dict must hold weights by name, got list"),
            ({}, "state_dict must hold weights by name, got dict"),
            (dict(model={}, epoch=3), "weights by name, got keys epoch, model"),
            (
                dict(state_dict={3: 4}),
                "x.pth is not a checkpoint in the authors' format: state_dic",
            ),
            (dict(state_dict={}, arch=["resnet18"]), "unknown architecture ['resnet18'] in"),
            (dict(state_dict={}), "unknown architecture None in"),
            (dict(state_dict={}, arch="vgg16"), "x.pth; arch must be one of resnet18, resnet34"),
        ],
    )
    def test_other_contents(self, tmp_path, content, message):
        torch.save(content, tmp_path / "x.pth")
        assert message in self.refused(tmp_path / "x.pth", tmp_path)

    def test_another_architecture(self, resnet18, theirs, tmp_path):
        message = self.refused(theirs, tmp_path, arch="resnet34")
        assert message == f"arch must be resnet18, the architecture in {theirs}, got resnet34"
        path = save(tmp_path / "x.pth", resnet18, arch="resnet34")
        message = self.refused(path, tmp_path)
        assert (
            "does not fit resnet34: 96 keys are missing (backbone.layer1.2.conv1.weight" in message
        )

    def test_keys_shapes_and_values_that_do_not_fit(self, resnet18, tmp_path):
        state_dict = resnet18.state_dict()
        del state_dict["bn1.running_mean"]
        state_dict["pool.weight"] = torch.ones(1)
        state_dict["conv1.weight"] = torch.ones(64, 3, 3, 3)
        state_dict["fc.bias"] = torch.full((1000,), float("nan"))
        torch.save(dict(arch="resnet18", state_dict=state_dict), tmp_path / "x.pth")
        assert self.refused(tmp_path / "x.pth", tmp_path).endswith(
            "x.pth does not fit resnet18: 1 keys are missing (backbone.bn1.running_mean); 1 keys "
            "are unexpected (backbone.pool.weight); 1 shapes differ (backbone.conv1.weight "
            "(64, 3, 3, 3), not (64, 3, 7, 7)); 1 are not finite (head.fc.bias)"
        )

    @pytest.mark.parametrize(
        "value",
        [
            torch.ones(1000, 512).to_sparse(),
            torch.ones(1000, 512, device="meta"),
            torch.ones(1000, 512, dtype=torch.complex64),
            torch.ones(1, 1).expand(10**9, 512),
            "x",
        ],
        ids=["sparse", "meta", "complex", "expanded", "text"],
    )
    def test_other_values_than_dense_tensors(self, resnet18, tmp_path, value):
        state_dict = {**resnet18.state_dict(), "fc.weight": value}
        torch.save(dict(arch="resnet18", state_dict=state_dict), tmp_path / "x.pth")
        message = self.refused(tmp_path / "x.pth", tmp_path)
        assert "dense tensors of real numbers, got 1 other values (head.fc.weight)" in message

    def test_a_number_instead_of_the_heads_weights(self, resnet18, tmp_path):
        state_dict = {**resnet18.state_dict(), "fc.weight": torch.tensor(1.0)}
        torch.save(dict(arch="resnet18", state_dict=state_dict), tmp_path / "x.pth")
        message = self.refused(tmp_path / "x.pth", tmp_path)
        assert "1 shapes differ (head.fc.weight (), not (1000, 512))" in message

    def test_code_is_not_run_unless_the_file_is_trusted(self, resnet18, tmp_path):
        class Code:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "ran"),)

        path = save(tmp_path / "x.pth", resnet18, optimizer=Code())
        assert "contains code, posix.mkdir; trust must be True" in self.refused(path, tmp_path)
        assert not (tmp_path / "ran").exists()
        convert_checkpoint(path, str(tmp_path / "ours.pth"), trust=True)
        assert (tmp_path / "ran").exists() and (tmp_path / "ours.pth").exists()

    def test_a_target_that_cannot_be_written(self, theirs, tmp_path):
        with pytest.raises(IsADirectoryError, match="is a folder, not a file"):
            convert_checkpoint(theirs, str(tmp_path))
        with pytest.raises(FileNotFoundError, match=f"no folder {tmp_path}/none to write x.pth"):
            convert_checkpoint(theirs, str(tmp_path / "none" / "x.pth"))
        with pytest.raises(ValueError, match="target must be another file than source"):
            convert_checkpoint(theirs, theirs)


def test_what_the_file_does_not_say_can_be_given(resnet18, tmp_path):
    """A state dict from one GPU, with another number of classes, in the format before torch 1.6."""
    state_dict = resnet18.state_dict()
    state_dict.update({"fc.weight": torch.ones(7, 512), "fc.bias": torch.ones(7)})
    torch.save(
        dict(state_dict=state_dict), tmp_path / "x.pth", _use_new_zipfile_serialization=False
    )
    convert_checkpoint(str(tmp_path / "x.pth"), str(tmp_path / "ours.pth"), arch="resnet18")
    assert torch.load(tmp_path / "ours.pth")["state_dict"]["head.fc.bias"].shape == (7,)


def test_the_tool(run_tool, theirs, tmp_path):
    status, out, _ = run_tool("convert", theirs, tmp_path / "ours.pth")
    assert status == 0 and f"wrote {tmp_path}/ours.pth" in out
    assert "padding=((1, 0), (1, 0))" in out
    lines = out[out.index("custom_imports") :]
    assert detector(lines, tmp_path).backbone.maxpool.padding == ((1, 0), (1, 0))
    status, _, err = run_tool("convert", tmp_path / "no", tmp_path / "x")
    assert (status, err) == (2, f"error: no checkpoint at {tmp_path}/no\n")
