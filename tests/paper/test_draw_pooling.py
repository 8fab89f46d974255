"""Pictures of pooling methods, and the command line that draws them."""

import cv2
import numpy as np
import pytest
import torch
from mmdet.registry import MODELS

import draw_pooling as pooling
from mmsoftpool.config import load_config

from ..common import config_path, rand

DEMO = config_path("demo_retinanet_softpool")


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """An image file with waves and an edge."""
    y, x = np.mgrid[:60, :80]
    waves = 120 + 100 * np.sin(x[..., None] / (3 + np.arange(3)) + y[..., None] / 7)
    waves[y > 35] = 20
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    cv2.imwrite(str(path), waves.astype(np.uint8))
    return path


def size_of(path):
    height, width = cv2.imread(str(path)).shape[:2]
    return width, height


class TestDrawPooling:
    def test_draws_every_method_at_every_kernel(self, run_tool, photo, tmp_path):
        for name, args in (("all", []), ("few", ["--methods", "average", "softpool"])):
            out = tmp_path / f"{name}.png"
            assert run_tool("draw_pooling", photo, "--out", out, *args)[0] == 0
        (width, height), few = size_of(tmp_path / "all.png"), size_of(tmp_path / "few.png")
        assert width > 1000 and 600 < height < 1000  # 2 kernels in 2 rows each of 6
        assert few[0] > 4 * few[1] * 0.8  # 5 panels in one row

    def test_region_and_zoom(self, run_tool, photo, tmp_path):
        out = tmp_path / "x.jpg"
        status, _, _ = run_tool(
            *("draw_pooling", photo, "--out", out, "--kernel", 3, "--methods", "softpool"),
            *("--region", 0, 0, 60, 20, "--zoom", 5, 5, 9, 9),
        )
        assert status == 0 and size_of(out)[0] > 3 * size_of(out)[1]  # two panels of 3 to 1

    def test_softpool_has_a_panel_for_each_alpha(self, run_tool, photo, tmp_path):
        for name, alphas in (("one", [4]), ("three", [0, 1, 4])):
            out = tmp_path / f"{name}.png"
            args = ("--kernel", 3, "--methods", "softpool", "--alpha", *alphas)
            assert run_tool("draw_pooling", photo, "--out", out, *args)[0] == 0
        one, three = size_of(tmp_path / "one.png"), size_of(tmp_path / "three.png")
        assert 1.8 < three[0] / one[0] < 2.2  # with the original, 4 panels in a row and 2

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (dict(alphas=(-1,)), "alpha must be .* got -1"),
            (dict(kernels=(1,)), "kernels must be from 2 to half of the region's .* got 1"),
            (dict(methods=("max",)), "methods must be of average, .* got 'max'"),
            (dict(scale=-1), "scale must be positive, got -1"),
            (dict(columns=0), "columns must be at least 1, got 0"),
            (dict(region=(0, 0, 99, 9)), "region must be X Y WIDTH HEIGHT inside the image"),
            (dict(zoom=(0, 0, 19, 19)), "zoom must be X Y WIDTH HEIGHT inside the region"),
        ],
    )
    def test_an_argument_out_of_its_range_is_named(self, tmp_path, arguments, message):
        with pytest.raises(ValueError, match=message):
            pooling.draw_pooling(rand(1, 3, 30, 40), tmp_path / "x.png", **arguments)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["--out", "x.txt"], "error: a picture must end in one of"),
            (["--alpha", -1], "error: alpha must be a finite number >= 0, got -1"),
            (["--kernel", 40], "error: kernels must be from 2 to half of the region's"),
            (["--config", DEMO], "error: config and checkpoint must be given together"),
            (["--config", DEMO, "--checkpoint", "x.pth"], "error: no checkpoint at /"),
        ],
    )
    def test_a_mistake_is_one_line(self, run_tool, photo, tmp_path, args, message):
        out = [] if "--out" in args else ["--out", tmp_path / "x.png"]
        status, _, error = run_tool("draw_pooling", photo, *out, *args)
        assert status == 2 and error.splitlines()[-1].startswith(message)

    def test_a_file_that_is_missing_or_not_an_image(self, run_tool, tmp_path):
        (tmp_path / "notes.txt").write_text("no image")
        for name, message in (
            ("notes.txt", f"error: {tmp_path}/notes.txt is not an image"),
            ("0.png", f"error: no image at {tmp_path}/0.png"),
        ):
            status, _, error = run_tool("draw_pooling", tmp_path / name, "--out", "x.png")
            assert status == 2 and error.strip() == message


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    cfg = load_config(DEMO)
    path = tmp_path_factory.mktemp("stem") / "demo.pth"
    torch.manual_seed(0)
    torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict()), path)
    return path


class TestDrawStem:
    def test_the_activations_are_the_input_of_the_stems_pool(self, photo, checkpoint):
        cfg = load_config(DEMO)
        image, activations, arguments = pooling.stem_activations(cfg, str(checkpoint), str(photo))
        # 60 x 80 is resized to 120 x 160, and the stem's convolution has stride 2.
        assert image.shape == (120, 160, 3) and activations.shape == (32, 60, 80)
        assert arguments == dict(
            kernel_size=3, stride=2, padding=1, dilation=1, ceil_mode=False, alpha=1.0
        )
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

    def test_draws_a_row_per_channel(self, run_tool, photo, checkpoint, tmp_path):
        heights = []
        for channels in (1, 2):
            out = tmp_path / "stem.png"
            status, _, error = run_tool(
                *("draw_pooling", photo, "--config", DEMO, "--checkpoint", checkpoint),
                *("--channels", channels, "--out", out),
            )
            assert status == 0, error
            width, height = size_of(out)
            assert width > 1200
            heights.append(height)
        assert heights[0] > 300 and 1.3 < heights[1] / heights[0] < 1.6  # 2 and 3 rows

    @pytest.mark.parametrize(("alpha", "weight"), [(0, 1 / 4), (200, 1)])
    def test_the_largest_weight_is_that_of_the_pools_alpha(
        self, monkeypatch, tmp_path, alpha, weight
    ):
        figures = []
        monkeypatch.setattr(pooling, "save_figure", lambda figure, *_, **__: figures.append(figure))
        activations = torch.arange(64.0).view(1, 8, 8)
        arguments = dict(kernel_size=2, padding=1, alpha=alpha)
        pooling.draw_stem(np.zeros((8, 8, 3)), activations, arguments, tmp_path / "x.png", 1)
        (panel,) = figures[0].axes[4].images  # the last column of the first row
        weights = panel.get_array()
        np.testing.assert_allclose(weights[1:-1, 1:-1], weight)
        assert weights[0, 0] == 1  # the window of one tap in the corner

    def test_at_least_one_channel(self, tmp_path):
        with pytest.raises(ValueError, match="channels must be at least 1, got 0"):
            pooling.draw_stem(
                np.zeros((8, 8, 3)), rand(4, 8, 8), dict(kernel_size=2), tmp_path / "x.png", 0
            )

    def test_a_checkpoint_of_another_model(self, run_tool, photo, checkpoint, tmp_path):
        status, _, error = run_tool(
            *("draw_pooling", photo, "--config", DEMO, "--checkpoint", checkpoint),
            *("--cfg-options", "model.backbone.depth=34", "--out", tmp_path / "x.png"),
        )
        assert status == 2 and f"error: {checkpoint} does not fit the model" in error
