"""docs/inference.md from top to bottom, and the whole detectors that it exports."""

import json
import pickle
import re
import shlex

import cv2
import numpy as np
import pytest
import torch
from mmdet.apis import inference_detector
from mmdet.models import DetDataPreprocessor
from mmdet.models.dense_heads import AnchorHead
from mmdet.registry import DATASETS, TRANSFORMS
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mmsoftpool.config import load_config
from mmsoftpool.detections import Preprocessing, metadata
from mmsoftpool.export import TOLERANCE, NetworkWithNMS, export
from mmsoftpool.runner import build_model

from .common import ROOT, blocks, in_openvino_thread

PAGE = ROOT / "docs" / "inference.md"
DEMO = "configs/demo/demo_retinanet_softpool.py"
PHOTO = "data/shapes/val/000000.jpg"
SMALL = {
    "test_dataloader.dataset.pipeline.1.scale": (160, 128),
    "model.backbone.init_cfg": None,
    "model.backbone.depth": 18,
    "model.backbone.base_channels": 8,
    "model.neck.in_channels": [8, 16, 32, 64],
}
SMALL_SPP = {
    "test_dataloader.dataset.pipeline.1.scale": (160, 160),
    "model.backbone.backbone.init_cfg": None,
}
DETECTORS = {
    "retinanet_r50_softpool": SMALL,
    "yolox_s_softpool": SMALL_SPP,
    "rtmdet_s_softpool": SMALL_SPP | {"test_dataloader.dataset.pipeline.2.size": (160, 160)},
    "atss": SMALL,
}


def random_photo(height, width, seed=0):
    rng = np.random.default_rng(seed)
    return cv2.resize(rng.integers(0, 256, (9, 12, 3), np.uint8), (width, height))


def build_detector(cfg, photos=None):
    """Builds a detector with random weights whose scores and boxes differ between places.

    Scales the last convolutions so that the outputs for ``photos`` are spread as a trained
    detector's; batch norms take their statistics from the same photos.
    """
    torch.manual_seed(0)
    model = build_model(cfg)
    model.init_weights()
    model.cfg = cfg
    last, seen = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.BatchNorm2d, torch.nn.SyncBatchNorm)):
            module.momentum = 1.0
        kind = re.search(r"(cls|obj|reg)(\.\d+)?$", name)
        if kind and isinstance(module, torch.nn.Conv2d):
            last[module] = kind[1]
            torch.nn.init.normal_(module.weight, std=0.01)
            torch.nn.init.zeros_(module.bias)
    hooks = [
        conv.register_forward_hook(lambda conv, _, output: void(seen.setdefault(conv, output)))
        for conv in last
    ]
    anchors = isinstance(model.bbox_head, AnchorHead)
    with torch.no_grad():
        photos = [random_photo(120, 160, seed) for seed in range(2)] if photos is None else photos
        images, _ = Preprocessing(cfg)(torch.from_numpy(np.stack(photos)))
        model.bbox_head(model.neck(model.backbone(images)))
        for conv, output in seen.items():
            spread = dict(cls=(1, -3), obj=(1, 0), reg=(0.3, 0 if anchors else 1))
            std, mean = spread[last[conv]]
            conv.weight *= std / output.std()
            conv.bias += mean - output.mean() * std / output.std()
    for hook in hooks:
        hook.remove()
    return model.eval()


def void(_):
    """For a hook, which would replace the output by what it returns."""


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_with_nms_detects_what_mmdet_detects(name, tmp_path):
    config = ROOT / "configs" / f"{name}.py"
    if name == "atss":
        config = tmp_path / "atss.py"
        config.write_text('_base_ = "mmdet::atss/atss_r50_fpn_1x_coco.py"')
    cfg = load_config(str(config), DETECTORS[name])
    model = build_detector(cfg)
    photo = random_photo(300, 400)
    network = NetworkWithNMS(model, cfg).eval()
    with torch.no_grad():
        image = torch.from_numpy(cv2.resize(photo, (160, 120)))
        dets, labels = network(torch.stack([image.flip(1), image]))  # the second of a batch
    expected = inference_detector(model, photo).pred_instances
    count = min(len(expected), 300)
    assert count > 20 and dets.shape[2] == 5
    torch.testing.assert_close(dets[1, :count, 4], expected.scores[:count], rtol=0, atol=1e-4)
    close = (dets[1, :count, :4] * 2.5 - expected.bboxes[:count]).abs().amax(1) < 0.01
    close &= labels[1, :count] == expected.labels[:count]
    assert close.float().mean() > 0.98  # equal scores come in any order


def test_the_types_of_a_config_may_be_classes():
    cfg, classes = (load_config(str(ROOT / DEMO)) for _ in range(2))
    dataset = classes.test_dataloader.dataset
    dataset.type = DATASETS.get(dataset.type)
    classes.model.data_preprocessor.type = DetDataPreprocessor
    for step in dataset.pipeline:
        step.type = TRANSFORMS.get(step.type)
    expected, found = (metadata(c, Preprocessing(c)) for c in (cfg, classes))
    assert found == expected


def test_fewer_boxes_than_the_file_has_rows():
    cfg = load_config(str(ROOT / DEMO))
    cfg.model.test_cfg.max_per_img = 3000
    network = NetworkWithNMS(build_detector(cfg), cfg).eval()
    with torch.no_grad():
        dets, labels = network(torch.from_numpy(random_photo(64, 64))[None])
    found = labels[0] >= 0
    assert 10 < found.sum() < 3000 and not (~found[: found.sum()]).any()
    assert (dets[0, found, 4] > 0).all() and not dets[0, ~found].any()


def test_a_file_whose_detections_differ_is_noticed():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(1, 100, 1, generator=generator).sort(1, descending=True).values
    dets = torch.cat([100 * torch.rand(1, 100, 4, generator=generator), scores], -1)
    labels = torch.arange(100)[None] % 3
    expected = {"dets": dets, "labels": labels}

    def largest(dets, labels):
        found = list(NetworkWithNMS.differences([dets, labels], expected))
        assert [name for name, *_ in found] == ["scores", "boxes"]
        return [difference for _, difference, _ in found]

    assert largest(dets, labels) == [0, 0]
    swapped = torch.tensor([1, 0, *range(2, 100)])  # as for equal scores
    assert largest(torch.cat([dets[:, swapped, :4], scores], -1), labels[:, swapped]) == [0, 0]
    assert largest(dets + 0.001, labels)[0] > TOLERANCE
    assert largest(torch.cat([dets[..., :4] + 0.1, scores], -1), labels)[1] > TOLERANCE
    assert largest(dets, (labels + 1) % 3)[1] > TOLERANCE


@pytest.fixture
def page(tmp_path, monkeypatch):
    """The page's Python blocks, in a folder with the files that they name."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / PHOTO).parent.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return blocks(PAGE, "python")


def save(model, path):
    """Saves a detector as a training does."""
    meta = dict(
        cfg=model.cfg.pretty_text, dataset_meta=dict(classes=("disc", "square", "triangle", "star"))
    )
    torch.save(dict(state_dict=model.state_dict(), meta=meta), path)


def assert_same(found, expected, above=0.3):
    boxes, scores, labels = found
    expected = expected[expected.scores > above]
    assert len(scores) == len(expected) > 5
    np.testing.assert_allclose(scores, expected.scores, rtol=0, atol=1e-4)
    np.testing.assert_allclose(boxes, expected.bboxes, rtol=0, atol=0.05)
    np.testing.assert_array_equal(labels, expected.labels)


def test_the_page(page, tmp_path, run_tool):
    pytest.importorskip("onnxruntime")
    model = build_detector(load_config(DEMO))
    cv2.imwrite(PHOTO, random_photo(200, 260))
    cv2.imwrite(PHOTO.replace("0.jpg", "1.jpg"), random_photo(150, 100, seed=1))
    photo = cv2.imread(PHOTO)
    video = cv2.VideoWriter("shapes.avi", cv2.VideoWriter_fourcc(*"MJPG"), 5, (260, 200))
    for _ in range(3):
        video.write(photo)
    video.release()
    run = tmp_path / "work_dirs" / "demo_retinanet_softpool"
    run.mkdir(parents=True)
    save(model, run / "epoch_16.pth")
    mmdet_image, mmdet_video, runtime, openvino, pt2 = page
    namespace = {}

    exec(mmdet_image, namespace)
    expected = inference_detector(model, PHOTO).pred_instances
    assert len(namespace["found"]["scores"]) == len(expected)
    assert {path.name for path in (tmp_path / "found").rglob("*.jpg")} == {
        "000000.jpg",
        "000001.jpg",
    }
    assert len(list((tmp_path / "found" / "preds").glob("*.json"))) == 2

    exec(mmdet_video, namespace)
    video = cv2.VideoCapture("found.avi")
    frames = [frame for read, frame in iter(video.read, (False, None)) if read]
    assert [frame.shape for frame in frames] == [photo.shape] * 3
    assert np.abs(frames[0].astype(int) - photo).max() > 100  # boxes

    (command,) = blocks(PAGE, "sh")
    words = shlex.split(command.replace("\\\n", " "))
    status, out, error = run_tool(*words[1:])
    assert status == 0 and "wrote detector.onnx" in out, error
    exec(runtime, namespace)
    assert_same(namespace["detect"](photo), expected)
    small = cv2.imread(PHOTO.replace("0.jpg", "1.jpg"))  # a portrait photo
    assert_same(namespace["detect"](small), inference_detector(model, small).pred_instances)
    pytest.importorskip("openvino")
    in_openvino_thread(exec, openvino, namespace)
    assert_same(namespace["detect"](photo), expected)

    # Padded to a fixed size, for a quicker export.
    cfg = load_config(DEMO)
    cfg.test_dataloader.dataset.pipeline.insert(2, dict(type="Pad", size=(160, 160)))
    export(NetworkWithNMS(model, cfg).eval(), "pt2", "detector.pt2")
    exec(pt2, namespace)
    assert namespace["about"] == dict(
        scale=[160, 160], classes=["disc", "square", "triangle", "star"], score_thr=0.05
    )
    model.cfg = cfg
    assert_same(namespace["detect"](photo), inference_detector(model, PHOTO).pred_instances)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.test_cfg.nms.type": "soft_nms"}, r"test_cfg\.nms=dict\(type='nms'.*soft_nms"),
        ({"model.test_cfg.min_bbox_size": 4}, "no min_bbox_size above 0"),
        (
            {"test_dataloader.dataset.pipeline.1.keep_ratio": False},
            r"keep_ratio=True\) and at most a Pad after it, got .*'keep_ratio': False",
        ),
        (dict(type="RandomFlip", prob=1.0), "at most a Pad after it, got .*RandomFlip"),
        (dict(type="Resize", scale=9, keep_ratio=True), "at most a Pad after it, got .*Resize.*9"),
        (dict(type="Pad", size_divisor=32), "Pad to a fixed size, .* got .*'size_divisor': 32"),
    ],
)
def test_what_cannot_be_exported_is_named(change, message):
    cfg = load_config(str(ROOT / DEMO), {} if "type" in change else change)
    if "type" in change:
        cfg.test_dataloader.dataset.pipeline.insert(2, change)
    model = build_model(cfg)
    with pytest.raises(ValueError, match=message):
        NetworkWithNMS(model, cfg)


def test_heads_that_predict_in_their_own_way_are_refused(tmp_path):
    (tmp_path / "gfl.py").write_text('_base_ = "mmdet::gfl/gfl_r50_fpn_1x_coco.py"')
    cfg = load_config(str(tmp_path / "gfl.py"), SMALL)
    with pytest.raises(ValueError, match=r"predicts as mmdet's BaseDenseHead .* got GFLHead"):
        NetworkWithNMS(build_model(cfg), cfg)
    cfg = load_config(str(ROOT / "configs" / "mask_rcnn_r34_softpool.py"))
    with torch.device("meta"):
        model = build_model(cfg)
    with pytest.raises(ValueError, match="needs a single-stage detector, got MaskRCNN"):
        NetworkWithNMS(model, cfg)


IMAGES = 8
#: The scale of RetinaNet's photos, for a test of minutes.
SCALE = {"retinanet_r50_softpool": (400, 300)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["retinanet_r50_softpool", "yolox_s_softpool", "rtmdet_s_softpool"]
)
def test_the_files_have_the_ap_of_tools_test(name, coco_root, page, run_tool, tmp_path):
    """On photos of COCO. The detectors have random weights; so that their AP is not 0, the
    annotations are some of their own detections, moved a little."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    backbone = "model.backbone" if name in SCALE else "model.backbone.backbone"
    options = {
        f"{backbone}.init_cfg": None,
        "test_dataloader.num_workers": 0,
        "test_dataloader.persistent_workers": False,
        "test_dataloader.batch_size": 1,
    }
    if name in SCALE:
        options["test_dataloader.dataset.pipeline.1.scale"] = SCALE[name]
    config = str(ROOT / "configs" / f"{name}.py")
    data = json.loads((coco_root / "annotations" / "instances_val2017.json").read_text())
    data["images"] = data["images"][:IMAGES]
    photos = {
        image["id"]: cv2.imread(str(coco_root / "val2017" / image["file_name"]))
        for image in data["images"]
    }
    cfg = load_config(config, options)
    width, height = SCALE.get(name, (640, 480))
    model = build_detector(cfg, [cv2.resize(photo, (width, height)) for photo in photos.values()])
    save(model, "weights.pth")
    cv2.imwrite(PHOTO, photos[data["images"][0]["id"]])

    def evaluate(annotations):
        data["annotations"] = annotations
        (tmp_path / "annotations.json").write_text(json.dumps(data))
        ann_file = str(tmp_path / "annotations.json")
        arguments = {
            **options,
            "test_dataloader.dataset.ann_file": ann_file,
            "test_dataloader.dataset.data_root": f"{coco_root}/",
            "test_evaluator.ann_file": ann_file,
        }
        arguments = [f"{key}={value}".replace(" ", "") for key, value in arguments.items()]
        status, out, error = run_tool(
            "test", config, "weights.pth", "--out", "predictions.pkl", "--cfg-options", *arguments
        )
        assert status == 0, error
        return float(re.findall(r"coco/bbox_mAP: ([\d.-]+)", out + error)[-1])

    categories = sorted(category["id"] for category in data["categories"])
    image = data["images"][0]["id"]
    box = dict(id=1, image_id=image, category_id=categories[0], bbox=[0, 0, 9, 9], area=81)
    evaluate([box | dict(iscrowd=0)])
    predictions = pickle.loads((tmp_path / "predictions.pkl").read_bytes())
    if "max_per_img" not in cfg.model.test_cfg:
        # mmdet keeps all boxes, the file 300: a threshold that no more of them reach.
        scores = [p["pred_instances"]["scores"].sort(descending=True).values for p in predictions]
        threshold = max(values[300].item() for values in scores if len(values) > 300)
        cfg.model.test_cfg.score_thr = options["model.test_cfg.score_thr"] = threshold
        print(f"{name}: a threshold of {threshold}")
    annotations, rng = [], np.random.default_rng(0)
    for predicted in predictions:
        found = predicted["pred_instances"]
        chosen = [i for i in range(0, 40, 2) if i < len(found["scores"])]
        for box, label in zip(found["bboxes"][chosen], found["labels"][chosen], strict=True):
            x1, y1, x2, y2 = box.tolist()
            width, height = x2 - x1, y2 - y1
            x, y = rng.uniform(-0.1, 0.1, 2) * (width, height) + (x1, y1)
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=predicted["img_id"],
                    category_id=categories[label],
                    bbox=[x, y, width, height],
                    area=width * height,
                    iscrowd=0,
                )
            )
    expected = evaluate(annotations)
    assert 0.05 < expected < 0.9

    truth = COCO(str(tmp_path / "annotations.json"))
    network = NetworkWithNMS(model, cfg).eval()
    namespace = {}
    for block, format in zip(page[2:], ("onnx", None, "pt2"), strict=True):
        if format:
            export(network, format, f"detector.{format}")
        in_openvino_thread(exec, block, namespace)
        results = [
            dict(
                image_id=id,
                category_id=categories[label],
                bbox=[*box[:2].tolist(), *(box[2:] - box[:2]).tolist()],
                score=float(score),
            )
            for id, photo in photos.items()
            for box, score, label in zip(
                *namespace["detect"](photo, namespace["about"]["score_thr"]), strict=True
            )
        ]
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        print(f"{name}, block {block[:40]!r}: AP {evaluation.stats[0]:.4f}, {expected:.4f}")
        assert abs(evaluation.stats[0] - expected) < 0.001
