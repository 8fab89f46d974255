"""The command lines around the pooling methods, run in this process, and their pictures."""

import gc
import json
import runpy
import sys

import cv2
import numpy as np
import pytest
import torch
from mmdet.registry import MODELS

from mmsoftpool import engine
from mmsoftpool.analysis import similarity
from mmsoftpool.models.pooling_methods import METHODS

from ..common import ROOT, SHARED

DEMO = str(ROOT / "configs" / "demo_retinanet_softpool.py")


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a tool with arguments; returns its exit status, stdout and stderr."""

    def run(tool, *args):
        path = str(ROOT / "tools" / f"{tool}.py")
        monkeypatch.setattr(sys, "argv", [path, *map(str, args)])
        status = 0
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as error:
            status = error.code
        return (status, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two smooth images with an edge, and a text."""
    path = tmp_path_factory.mktemp("photos")
    y, x = np.mgrid[:60, :80]
    for number in (1, 2):
        wave = 120 + 100 * np.sin(x[..., None] / (2 + number + np.arange(3)) + y[..., None] / 7)
        wave[y > 30 + 5 * number] = 20
        cv2.imwrite(str(path / f"{number}.png"), wave.astype(np.uint8))
    (path / "notes.txt").write_text("no image")
    return path


def size_of(path):
    height, width = cv2.imread(str(path)).shape[:2]
    return width, height


class TestImageSimilarity:
    def test_prints_every_method_beside_the_paper_and_writes_files(self, run, folder, tmp_path):
        files = [tmp_path / name for name in ("x.csv", "x.png")]
        status, out, _ = run("image_similarity", folder, "--csv", files[0], "--plot", files[1])
        assert status == 0 and "skipped notes.txt: not an image" in out
        for method in METHODS:
            rows = [line for line in out.splitlines() if f"│ {method}" in line]
            assert len(rows) == 3, method
        assert "0.729" in out and "52.36" in out  # of the paper
        assert "lip*" in out and "* with its weights from before training" in out
        assert "k = 5, PSNR: rank correlation with the paper's data sets" in out
        assert len(files[0].read_text().splitlines()) == 1 + 2 * 3 * len(METHODS)
        assert files[1].stat().st_size > 10_000

    def test_a_few_methods_and_another_kernel(self, run, folder):
        status, out, _ = run(
            "image_similarity", folder, "--kernel", 4, "--methods", "softpool", "--match", "pooled"
        )
        assert status == 0 and out.count("│ softpool") == 1 and "rank correlation" not in out

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["/missing"], "error: no folder at /missing"),
            (["."], "error: no image to compare in"),
            ([".", "--scale", "0"], "error: --scale must be positive, got 0.0"),
            ([".", "--resume"], "error: --resume needs --csv"),
            ([".", "--csv", "/missing/x.csv"], "error: no folder /missing to write"),
        ],
    )
    def test_mistakes(self, run, args, message):
        status, _, error = run("image_similarity", *args)
        assert status == 2 and error.startswith(message)

    def test_on_a_photo_average_pooling_is_first_and_soft_pool_close_behind(self):
        path = SHARED / "data" / "kodak" / "23.png"
        if not path.exists():
            pytest.skip(f"no photo at {path}")
        image = similarity.read_image(path)[..., 100:356, 100:356]
        psnr = {
            method: similarity.similarity(image, similarity.pool_image(image, method, 3), 3)["psnr"]
            for method in METHODS
        }
        places = similarity.ranks(psnr)
        assert places["average"] == places["lip"] == 1 and 3 <= places["softpool"] <= 4
        assert sorted(places, key=places.get)[-2:] == ["power-average", "sum"]


class TestDrawPooling:
    def test_draws_every_method_at_every_kernel(self, run, folder, tmp_path):
        for name, args in (("all", []), ("few", ["--methods", "average", "softpool"])):
            out = tmp_path / f"{name}.png"
            assert run("draw_pooling", folder / "1.png", "--out", out, *args)[0] == 0
        (width, height), few = size_of(tmp_path / "all.png"), size_of(tmp_path / "few.png")
        assert width > 1000 and 600 < height < 1000  # 2 kernels in 2 rows each of 6
        assert few[0] > 4 * few[1] * 0.8  # 5 panels in one row

    def test_region_and_zoom(self, run, folder, tmp_path):
        out = tmp_path / "x.jpg"
        args = ("--kernel", 3, "--methods", "softpool", "--region", 0, 0, 60, 20)
        status, _, _ = run(
            "draw_pooling", folder / "1.png", "--out", out, *args, "--zoom", 5, 5, 9, 9
        )
        assert status == 0 and size_of(out)[0] > 3 * size_of(out)[1]  # two panels of 3 to 1

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["--out", "x.gif"], "error: --out must be a .png, .jpg or .pdf file"),
            (["--region", 0, 0, 99, 20], "error: region must be X Y WIDTH HEIGHT inside the image"),
            (["--zoom", 0, 0, 79, 59], "error: zoom must be"),
            (["--kernel", 40], "error: kernel must be from 2 to half of the region"),
            (["--config", DEMO], "error: --config and --checkpoint go together"),
            (["--config", DEMO, "--checkpoint", "x.pth"], "error: no checkpoint at /"),
            (["--columns", 0], "error: --scale, --columns and --channels must be positive"),
        ],
    )
    def test_mistakes(self, run, folder, tmp_path, args, message):
        out = [] if "--out" in args else ["--out", tmp_path / "x.png"]
        status, _, error = run("draw_pooling", folder / "1.png", *out, *args)
        assert status == 2 and error.splitlines()[-1].startswith(message)

    def test_mistaken_images(self, run, folder, tmp_path):
        for path, message in (
            (folder / "notes.txt", f"error: {folder}/notes.txt is not an image"),
            (folder / "0.png", f"error: no image at {folder}/0.png"),
        ):
            status, _, error = run("draw_pooling", path, "--out", tmp_path / "x.png")
            assert status == 2 and error.strip() == message


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    cfg = engine.load_config(DEMO)
    path = tmp_path_factory.mktemp("stem") / "demo.pth"
    torch.manual_seed(0)
    torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict()), path)
    return path


class TestStem:
    def test_activations_are_what_the_stem_gives_its_pool(self, folder, checkpoint):
        from mmsoftpool.visualization.pooling import stem_activations

        cfg = engine.load_config(DEMO)
        image, activations, pooling = stem_activations(cfg, str(checkpoint), str(folder / "1.png"))
        # 60 x 80 is resized to 120 x 160, and the stem's convolution has stride 2.
        assert image.shape == (120, 160, 3) and activations.shape == (32, 60, 80)
        assert pooling == dict(kernel_size=3, stride=2, padding=1, dilation=1, ceil_mode=False)
        model = MODELS.build(cfg.model).eval()
        model.load_state_dict(torch.load(checkpoint)["state_dict"])
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() * 255
        means = torch.tensor(cfg.model.data_preprocessor.mean).view(3, 1, 1)
        deviations = torch.tensor(cfg.model.data_preprocessor.std).view(3, 1, 1)
        backbone = model.backbone
        expected = backbone.norm1(backbone.conv1((pixels - means) / deviations)).relu()
        inside = (..., slice(0, 55), slice(0, 75))  # padding to a multiple of 32 reaches the edge
        torch.testing.assert_close(
            activations[inside], expected[0][inside].detach(), rtol=1e-4, atol=1e-4
        )

    def test_draws_them(self, run, folder, checkpoint, tmp_path):
        out = tmp_path / "stem.png"
        status, _, error = run(
            "draw_pooling", folder / "1.png", "--config", DEMO, "--checkpoint", checkpoint,
            "--channels", 2, "--out", out,
        )  # fmt: skip
        assert status == 0, error
        width, height = size_of(out)
        assert width > 1200 and height > 500

    def test_a_checkpoint_of_another_model_is_refused(self, run, folder, checkpoint, tmp_path):
        status, _, error = run(
            "draw_pooling", folder / "1.png", "--config", DEMO, "--checkpoint", checkpoint,
            "--cfg-options", "model.backbone.depth=34", "--out", tmp_path / "x.png",
        )  # fmt: skip
        assert status == 2 and f"error: {checkpoint} does not fit the model" in error


@pytest.mark.parametrize("tool", ["image_similarity", "draw_pooling"])
def test_help(run, tool):
    status, out, _ = run(tool, "--help")
    assert status == 0 and "Example" in out and "python tools/" in out


@pytest.fixture
def small_heap():
    """Leaves what is alive out of the garbage collections that come before every measurement."""
    gc.freeze()
    yield
    gc.unfreeze()


def test_benchmark_times_the_papers_methods(run, tmp_path, small_heap):
    status, out, _ = run(
        "benchmark", "pooling", "--device", "cpu", "--shape", 1, 4, 16, 16, "--rounds", 1,
        "--kernel", "3,2,1", "--json", tmp_path / "x.json", "--plot", tmp_path / "x.png",
    )  # fmt: skip
    assert status == 0 and "paper fwd" in out
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert [row["method"] for row in rows] == list(METHODS)
    for row in rows:
        assert "error" not in row
        assert min(row[key] for key in ("forward", "backward", "both", "both_memory")) > 0
    assert rows[0]["paper_forward"] == 0.009 and rows[-1]["paper_backward"] == 0.156
    assert (tmp_path / "x.png").stat().st_size > 10_000
