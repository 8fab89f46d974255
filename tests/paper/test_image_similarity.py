"""SSIM and PSNR of pooled images, of folders of them, and beside the paper's."""

import math
import re

import cv2
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

import image_similarity as similarity
import tables
from pooling_methods import METHODS

from ..common import SHARED, rand


@pytest.fixture
def image():
    return rand(1, 3, 40, 45)


@pytest.fixture
def folder(tmp_path, image):
    """Two images, a small one, and a text."""
    path = tmp_path / "photos"
    path.mkdir()
    for name, values in (("a.png", image), ("b.jpg", 1 - image), ("small.png", image[..., :9, :])):
        pixels = (values[0].permute(1, 2, 0).flip(2) * 255).round().byte().numpy()
        cv2.imwrite(str(path / name), pixels)
    (path / "notes.txt").write_text("no image")
    (path / "nothing.png").touch()
    return path


class TestSimilarity:
    def test_a_constant_image_survives_every_method_that_takes_means(self):
        image = torch.full((1, 3, 24, 24), 0.25)
        for method in METHODS:
            result = similarity.similarity(image, similarity.pool_image(image, method, 2), 2)
            if method in ("sum", "power-average"):  # 4 and 2 times as bright
                error = {"sum": 0.75, "power-average": 0.25}[method]
                assert result["psnr"] == pytest.approx(-20 * math.log10(error), abs=1e-4)
            else:
                assert result["ssim"] == pytest.approx(1) and result["psnr"] > 100

    def test_psnr_is_that_of_the_pooled_pixels_over_their_windows(self, image):
        pooled = similarity.pool_image(image, "maximum", 3)
        error = 0.0
        for y in range(39):
            for x in range(45):
                error += (image[0, :, y, x] - pooled[0, :, y // 3, x // 3]).square().sum().item()
        expected = -10 * math.log10(error / (3 * 39 * 45))
        assert similarity.similarity(image, pooled, 3)["psnr"] == pytest.approx(expected)

    def test_pixels_that_no_window_covers_do_not_count(self, image):
        changed = image.clone()
        changed[..., 39:, :] = 1
        results = [
            similarity.similarity(x, similarity.pool_image(x, "softpool", 3), 3)
            for x in (image, changed)
        ]
        assert results[0] == results[1]

    def test_no_method_has_a_higher_psnr_than_average_pooling(self, image):
        for kernel in (2, 3, 5):
            psnr = {
                method: similarity.similarity(
                    image, similarity.pool_image(image, method, kernel), kernel
                )["psnr"]
                for method in METHODS
            }
            assert max(psnr.values()) <= psnr["average"] + 1e-5

    def test_average_pooling_is_perfect_at_the_pooled_size(self, image):
        pooled = similarity.pool_image(image, "average", 3)
        result = similarity.similarity(image, pooled, 3, match="pooled")
        assert result["ssim"] == pytest.approx(1) and result["psnr"] > 100

    def test_with_white_at_255_soft_pool_is_nearly_max_pooling(self, image):
        soft = similarity.pool_image(image, "softpool", 2, scale=255)
        largest, average = F.max_pool2d(image, 2), F.avg_pool2d(image, 2)
        assert (largest - soft).mean() < 0.05 * (largest - average).mean()
        soft = similarity.pool_image(image, "softpool", 2)
        assert (soft - average).mean() < 0.3 * (largest - average).mean()

    def test_stochastic_methods_give_a_sample_or_their_expectation(self, image):
        for method in tables.STOCHASTIC:
            first, second, other = (
                similarity.pool_image(image, method, 2, seed=seed) for seed in (0, 0, 1)
            )
            assert first.equal(second) and not first.equal(other)
            first, other = (
                similarity.pool_image(image, method, 2, expectation=True, seed=seed)
                for seed in (0, 1)
            )
            assert first.equal(other)


class TestFolder:
    def test_a_row_per_image_kernel_and_method_and_the_skipped_files(self, folder, tmp_path):
        rows, skipped = similarity.image_similarity(folder, [2, 3], csv_file=tmp_path / "x.csv")
        assert list(rows[["image", "kernel", "method"]].itertuples(index=False, name=None)) == [
            (name, k, method) for name in ("a.png", "b.jpg") for k in (2, 3) for method in METHODS
        ]
        assert skipped == {
            "notes.txt": "not an image",
            "nothing.png": "not an image",
            "small.png": "45 x 9 pixels, must be at least 13 x 13",
        }
        pd.testing.assert_frame_equal(similarity.read_rows(tmp_path / "x.csv"), rows)
        similarity.plot(rows, tmp_path / "x.png")
        assert (tmp_path / "x.png").stat().st_size > 10_000

    def test_a_method_gives_the_same_alone(self, folder):
        rows, _ = similarity.image_similarity(folder, [2])
        alone, _ = similarity.image_similarity(folder, [2], ["s3"])
        expected = rows[rows["method"] == "s3"].reset_index(drop=True)
        pd.testing.assert_frame_equal(alone, expected)

    def test_an_interrupted_run_resumes(self, folder, tmp_path, monkeypatch):
        path = tmp_path / "x.csv"
        rows, skipped = similarity.image_similarity(folder, [2], csv_file=path)
        whole = path.read_text()
        path.write_text("".join(whole.splitlines(keepends=True)[:-3]))
        pooled = []
        original = similarity.pool_image
        monkeypatch.setattr(
            similarity, "pool_image", lambda *args: pooled.append(1) or original(*args)
        )
        again, others = similarity.image_similarity(folder, [2], csv_file=path, resume=True)
        pd.testing.assert_frame_equal(again, rows)
        assert others == skipped and path.read_text() == whole and len(pooled) == 3

        pooled.clear()  # other settings are not these results
        similarity.image_similarity(folder, [2], scale=255.0, csv_file=path, resume=True)
        assert len(pooled) == 2 * len(METHODS)
        path.write_text("a,b\n1,2\n")
        with pytest.raises(ValueError, match=r"x\.csv was not written by image_similarity"):
            similarity.image_similarity(folder, [2], csv_file=path, resume=True)

    def test_no_image_that_is_large_enough(self, folder, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match=r"no image to compare .*\(empty\)"):
            similarity.image_similarity(tmp_path / "empty")
        with pytest.raises(ValueError, match=r"no image to compare .*a\.png: 45 x 40 pixels"):
            similarity.image_similarity(folder, [5], match="pooled")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (dict(kernels=[1]), "kernels must be at least 2, got 1"),
            (dict(methods=["max"]), "methods must be of average, maximum, .* got 'max'"),
            (dict(match="none"), "match must be one of original, pooled, got 'none'"),
            (dict(scale=0), "scale must be positive, got 0"),
        ],
    )
    def test_an_argument_out_of_its_range_is_named(self, folder, tmp_path, arguments, message):
        with pytest.raises(ValueError, match=message):
            similarity.image_similarity(folder, csv_file=tmp_path / "x.csv", **arguments)
        assert not (tmp_path / "x.csv").exists()

    def test_a_missing_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=f"no folder at {tmp_path}/missing"):
            similarity.image_similarity(tmp_path / "missing")


def test_the_papers_own_numbers_have_its_order():
    papers = {k: similarity.of_the_paper(METHODS, k)["DIV2K"] for k in (2, 5)}
    rows = pd.concat(papers, names=["kernel", "method"]).reset_index().assign(image="x")
    comparison = similarity.compare_with_paper(rows)
    assert list(comparison.index) == [(2, "ssim"), (2, "psnr"), (5, "ssim"), (5, "psnr")]
    assert comparison["high"].to_list() == pytest.approx([1] * 4)
    assert (comparison["low"] < comparison["high"]).all()
    assert (comparison[["rank", "better", "images"]] == 1).all(axis=None)
    assert comparison["difference"].iloc[0] == pytest.approx(0.729 - 0.714)


def test_on_a_photo_average_pooling_is_first_and_soft_pool_close_behind():
    path = SHARED / "data" / "kodak" / "23.png"
    if not path.exists():
        pytest.skip(f"no photo at {path}")
    image = similarity.read_image(path)[..., 100:356, 100:356]
    psnr = {
        method: similarity.similarity(image, similarity.pool_image(image, method, 3), 3)["psnr"]
        for method in METHODS
    }
    places = similarity.ranks(pd.Series(psnr))
    assert places["average"] == places["lip"] == 1 and 3 <= places["softpool"] <= 4
    assert list(places.sort_values().index[-2:]) == ["power-average", "sum"]


class TestTool:
    def test_prints_every_method_beside_the_paper_and_writes_files(
        self, run_tool, folder, tmp_path
    ):
        files = [tmp_path / name for name in ("x.csv", "x.png")]
        status, out, _ = run_tool("image_similarity", folder, "--csv", files[0], "--plot", files[1])
        assert status == 0 and "skipped notes.txt: not an image" in out
        for method in METHODS:
            assert len(re.findall(rf"^{method}\*? ", out, re.MULTILINE)) == 3, method
        assert "0.729" in out and "52.356" in out  # of the paper
        assert "lip*" in out and "* with untrained weights" in out
        assert re.search(r"^5 +ssim( +[+-][\d.]+){2} ", out, re.MULTILINE)  # the correlations
        assert len(files[0].read_text().splitlines()) == 1 + 2 * 3 * len(METHODS)
        assert files[1].stat().st_size > 10_000

    def test_a_few_methods_and_another_kernel(self, run_tool, folder):
        status, out, _ = run_tool(
            "image_similarity", folder, "--kernel", 4, "--methods", "softpool"
        )
        assert status == 0 and out.count("softpool ") == 1 and "DIV2K" not in out

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["/missing"], "error: no folder at /missing"),
            (["."], "error: no image to compare in"),
            ([".", "--scale", "0"], "error: scale must be positive, got 0.0"),
            ([".", "--resume"], "error: resume needs csv"),
            ([".", "--csv", "/missing/x.csv"], "error: no folder /missing to write"),
        ],
    )
    def test_a_mistake_is_one_line(self, run_tool, args, message):
        status, _, error = run_tool("image_similarity", *args)
        assert status == 2 and error.startswith(message)
