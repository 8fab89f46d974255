"""mmsoftpool robustness: trained detectors on corrupted images."""

import json

import numpy as np
import pytest
import torch
from mmengine.runner import Runner

from make_shapes import make_shapes
from mmsoftpool import SoftPool2d
from mmsoftpool.config import load_config
from mmsoftpool.errors import UserError
from mmsoftpool.evaluation import comparison, robustness
from mmsoftpool.evaluation.robustness import (
    CORRUPTIONS,
    KINDS,
    Corruption,
    Robustness,
    evaluate_robustness,
)
from mmsoftpool.runner import build_model

from ..common import config_path, rand

imagecorruptions = pytest.importorskip("imagecorruptions")

MAX, SOFT = "demo_retinanet_maxpool", "demo_retinanet_softpool"
SMALL = {
    "val_dataloader.num_workers": 0,
    "val_dataloader.persistent_workers": False,
    "model.backbone.base_channels": 8,
    "model.neck.in_channels": [8, 16, 32, 64],
}


@pytest.fixture
def detectors(tmp_path):
    """Two detectors with random weights, as evaluate_robustness takes them."""
    make_shapes(tmp_path / "shapes", train=1, val=2)
    made = {}
    for name in (MAX, SOFT):
        options = {**SMALL, "data_root": str(tmp_path / "shapes")}
        cfg = load_config(config_path(name), options, work_dir=str(tmp_path / "runs"))
        torch.manual_seed(0)
        checkpoint = tmp_path / f"{name}.pth"
        torch.save(dict(state_dict=build_model(cfg).state_dict()), checkpoint)
        made[name] = (cfg, [str(checkpoint)])
    return made


@pytest.fixture
def evaluations(monkeypatch):
    """Takes the place of the evaluation: the score is the mean of the first image."""
    seen = []

    def val(runner):
        image = runner.val_dataloader.dataset[0]["inputs"].float()
        pools = [pool.alpha for pool in runner.model.modules() if isinstance(pool, SoftPool2d)]
        seen.append((image, pools))
        return {"coco/bbox_mAP": float(image.mean()) / 255}

    monkeypatch.setattr(Runner, "val", val)
    return seen


def test_the_names_are_the_packages():
    assert list(CORRUPTIONS) == imagecorruptions.get_corruption_names()


@pytest.mark.parametrize("name", [*CORRUPTIONS, None])
def test_an_image_has_the_same_noise_in_every_evaluation(name):
    image = (255 * rand(64, 48, 3)).byte().numpy()
    transform = Corruption()
    transform.name, transform.severity = name, 3
    np.random.seed(5)
    expected = np.random.rand()
    np.random.seed(5)
    first, again, other = (
        transform.transform(dict(img=image.copy(), img_id=i))["img"] for i in (1, 1, 2)
    )
    assert np.random.rand() == expected
    assert first.shape == image.shape and first.dtype == image.dtype
    assert (first == image).all() == (name is None)
    assert (first == again).all()
    if name in (*KINDS["noise"], "glass_blur", "motion_blur", "elastic_transform"):
        assert (first != other).any()


def test_the_channels_have_their_colours():
    image = np.zeros((64, 64, 3), np.uint8)
    image[..., 2] = 200  # red, in OpenCV's order
    transform = Corruption()
    transform.name, transform.severity = "brightness", 3
    corrupted = transform.transform(dict(img=image, img_id=0))["img"]
    assert corrupted[..., 2].min() > 200 and corrupted[..., :2].max() < 60


def test_every_detector_is_evaluated_under_every_condition(detectors, evaluations, tmp_path):
    options = dict(corruptions=["gaussian_noise", "contrast"], severities=[1, 5])
    result = evaluate_robustness(detectors, tmp_path / "out", alphas=[0.5, 4.0], **options)
    assert len(evaluations) == 2 * 3 * (1 + 4)
    assert list(result.clean) == [
        name + part for name in (MAX, SOFT) for part in ("", " → α = 0.5", " → α = 4")
    ]
    alphas = [pools for _, pools in evaluations]
    assert alphas == [[]] * 5 + [[0.5]] * 5 + [[4.0]] * 5 + [[1.0]] * 5 + [[0.5]] * 5 + [[4.0]] * 5
    clean, noise, *_, contrast = (image for image, _ in evaluations[:5])
    assert (noise - clean).std() > 1 and contrast.std() < 0.7 * clean.std()
    for i in range(5, 30):
        assert (evaluations[i][0] == evaluations[i % 5][0]).all()
    corrupted = result.corrupted[MAX]
    assert corrupted.shape == (1, 2, 2) and result.clean[MAX].shape == (1,)
    assert corrupted[0, 1, 1] == pytest.approx(100 * contrast.mean().item() / 255)

    evaluate_robustness(detectors, tmp_path / "out", alphas=[0.5, 4.0], **options)
    assert len(evaluations) == 30
    more = evaluate_robustness(detectors, tmp_path / "out", remedies=["median"], **options)
    assert len(evaluations) == 40
    assert list(more.clean) == [f"{MAX}, median", f"{SOFT}, median"]
    assert (evaluations[31][0] - clean).std() < (noise - clean).std()
    assert "median" in (tmp_path / "out" / "robustness.md").read_text()
    assert (tmp_path / "out" / "robustness.png").stat().st_size > 1000


def test_the_table_and_the_picture_have_the_means_and_their_intervals(monkeypatch):
    result = Robustness(
        metric="coco/bbox_mAP",
        corruptions=("fog", "snow"),
        severities=(1, 3),
        clean={"a": np.array([80.0, 90.0]), "b": np.array([50.0])},
        corrupted={
            "a": np.array([[[60.0, 40.0], [30.0, 30.0]], [[70.0, 50.0], [40.0, 40.0]]]),
            "b": np.array([[[10.0, 10.0], [20.0, 40.0]]]),
        },
        data="shapes",
    )
    lines = result.markdown().splitlines()
    # Student's t with one degree of freedom: 12.706 x 5.
    assert lines[:4] == [
        "| box AP | clean | mPC | rPC, % | fog | snow | severity 1 | severity 3 |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        "| a | 85.0 ± 63.5 | 45.0 ± 63.5 | 52.8 ± 35.3 | 55.0 ± 63.5 | 35.0 ± 63.5 "
        "| 50.0 ± 63.5 | 40.0 ± 63.5 |",
        "| b | 50.0 | 20.0 | 40.0 | 10.0 | 30.0 | 15.0 | 25.0 |",
    ]
    assert lines[5].startswith("Means over checkpoints (1 or 2) and severities (1, 3). ±: 95 %")
    figures = []
    monkeypatch.setattr(robustness, "save_figure", lambda figure, out: figures.append(figure))
    result.plot("a.png")
    (figure,) = figures
    title = "shapes: means over checkpoints (1 or 2) and severities (1, 3)"
    assert figure.get_suptitle() == title
    assert figure.axes[0].get_xlabel() == "box AP, bars: 95 % intervals"


def test_all_corruptions_are_summed_up_by_their_kinds():
    table = np.arange(15.0).reshape(1, 15, 1)
    result = Robustness("coco/bbox_mAP", CORRUPTIONS, (3,), dict(a=np.array([50.0])), dict(a=table))
    lines = result.markdown().splitlines()
    assert lines[0] == "| box AP | clean | mPC | rPC, % | noise | blur | weather | digital |"
    assert lines[2] == "| a | 50.0 | 7.0 | 14.0 | 1.0 | 4.5 | 8.5 | 12.5 |"
    assert lines[4] == "| box AP | a |" and "| glass blur | 4.0 |" in lines


def test_the_heat_map_has_a_cell_for_each_detector_and_alpha(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(robustness, "save_figure", lambda figure, out: figures.append(figure))
    names = [
        f"{name}{alpha}{remedy}" for name in "ab" for alpha in "012" for remedy in ("", ", median")
    ]
    Robustness(
        metric="coco/bbox_mAP",
        corruptions=("fog",),
        severities=(1,),
        clean={name: np.array([i, i + 1.0]) for i, name in enumerate(names)},
        corrupted={name: np.full((2, 1, 1), 30.0 + i) for i, name in enumerate(names)},
        alphas=(0.5, 2.0),
        remedies=("none", "median"),
    ).plot_alphas(tmp_path / "a.png")
    clean, _, fog, nothing = figures[0].axes
    texts = [text.get_text() for text in clean.texts]
    assert texts == ["0.5", "2.5", "4.5", "6.5", "8.5", "10.5"]
    assert [text.get_text() for text in fog.texts] == [
        "30.0",
        "32.0",
        "34.0",
        "36.0",
        "38.0",
        "40.0",
    ]
    assert [label.get_text() for label in clean.get_yticklabels()] == ["a0", "b0"]
    assert [label.get_text() for label in fog.get_xticklabels()] == ["its own", "0.5", "2"]
    assert not nothing.axison


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(corruptions=["rain"]), r"corruptions must be different ones of .*got \['rain'\]"),
        (
            dict(severities=[0]),
            r"severities must be different ones of \(1, 2, 3, 4, 5\), got \[0\]",
        ),
        (dict(remedies=["none", "none"]), "remedies must be different ones of"),
        (dict(alphas=[-1.0]), "alpha"),
        (dict(alphas=[2.0, 2.0]), "alphas must be different"),
    ],
)
def test_wrong_arguments_are_named(detectors, evaluations, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        evaluate_robustness(detectors, tmp_path / "out", **arguments)
    assert not evaluations


def test_the_package_with_the_corruptions_is_named(detectors, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.metadata.Distribution.discover", lambda **_: iter(()))
    with pytest.raises(UserError, match="pip install imagecorruptions-imaug"):
        evaluate_robustness(detectors, tmp_path / "out")


def test_a_detector_without_pools_is_found_before_the_work(detectors, evaluations, tmp_path):
    with pytest.raises(ValueError, match=r"AvgPool2d"):
        evaluate_robustness(detectors, tmp_path / "out", alphas=[1.0], include="torch.nn.AvgPool2d")
    assert not evaluations


def test_the_command(detectors, tmp_path, run_tool):
    (_, (maximum,)), (_, (soft,)) = detectors.values()
    options = [f"{key}={value}".replace(" ", "") for key, value in SMALL.items()]
    command = ("robustness", config_path(MAX), maximum, "--also", config_path(SOFT), soft)
    command += ("--corruptions", "fog", "--severities", 2, "--work-dir", tmp_path / "out")
    command += ("--cfg-options", f"data_root={tmp_path / 'shapes'}", *options)
    status, out, error = run_tool(*command)
    assert status == 0, error
    assert "== 4 of 4" in out and "| box AP | clean | mPC | rPC, % | fog |" in out
    kept = json.loads((tmp_path / "out" / "robustness.json").read_text())
    assert len(kept) == 4
    status, _, error = run_tool(*command[:3], "--also", config_path(MAX), maximum)
    assert status == 2 and f"names must be 2 different ones, one a config, got ['{MAX}'" in error
    status, out, error = run_tool(*command, "--names", "maximum", "SoftPool, α = 1")
    assert status == 0 and "| maximum | " in out and "| SoftPool, α = 1 | " in out, error
    assert "==" not in out  # the scores are those of the first call
    status, _, error = run_tool(*command, "--alphas", 0.5, "--include", "torch.nn.AvgPool2d")
    assert status == 2 and "no pool to replace with include=[" in error and "AvgPool2d" in error


def test_a_pool_has_its_colour_in_every_picture_and_other_names_take_the_rest(monkeypatch):
    colours = []

    def read(figure, out):
        handles, labels = figure.axes[0].get_legend_handles_labels()
        lines = [getattr(handle, "lines", [handle])[0] for handle in handles]
        colours.append({label: line.get_color() for label, line in zip(labels, lines, strict=True)})

    monkeypatch.setattr(robustness, "save_figure", read)
    monkeypatch.setattr(comparison, "save_figure", read)
    names = ["mine", "SoftPool, α = 4", "yours", "max pooling"]
    variants = [f"{name}{alpha}, median" for name in names for alpha in ("", " → α = 8")]
    Robustness(
        metric="coco/bbox_mAP",
        corruptions=("fog",),
        severities=(1,),
        clean={name: np.ones(1) for name in variants},
        corrupted={name: np.ones((1, 1, 1)) for name in variants},
        alphas=(8.0,),
        remedies=("median",),
    ).plot("a.png")
    scores = (np.full((1, 6), 50.0),) * 4
    comparison.Comparison(tuple(names), scores, np.ones((3, 2, 6)), 0.95, 1000, 7).plot("a.png")
    expected = dict(zip(names, ("C1", "C2", "C3", "C0"), strict=True))
    detectors = [name.removesuffix(", median").split(" →")[0] for name in variants]
    assert list(colours[0].values()) == [expected[name] for name in detectors]
    assert colours[1] == {name: expected[name] for name in names[1:]}
