"""SSIM and PSNR of pooled images, and the paper's tables beside them."""

import math

import cv2
import pytest
import torch
import torch.nn.functional as F

from mmsoftpool.analysis import benchmark, similarity
from mmsoftpool.models.pooling_methods import METHODS

from ..common import SHARED

PAPER = SHARED / "seeds" / "paper.txt"
ROWS = {
    "average": "Average", "maximum": "Maximum", "power-average": "Pow-average", "sum": "Sum",
    "lp": "L_p", "gate": "Gate", "lite-s3dpp": "Lite-S3DPP", "lip": "LIP",
    "stochastic": "Stochastic", "s3": "S3", "softpool": "SoftPool (Ours)",
}  # fmt: skip


@pytest.fixture
def image():
    return torch.rand(1, 3, 40, 45, generator=torch.Generator().manual_seed(0))


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

    def test_stochastic_methods_are_drawn_or_expected(self, image):
        for method in similarity.STOCHASTIC:
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
    def test_a_row_per_image_kernel_and_method_and_the_rest_is_named(self, folder, tmp_path):
        rows, skipped = similarity.image_similarity(folder, [2, 3], csv_file=tmp_path / "x.csv")
        assert [(r["image"], r["kernel"], r["method"]) for r in rows] == [
            (name, k, method) for name in ("a.png", "b.jpg") for k in (2, 3) for method in METHODS
        ]
        assert skipped == {
            "notes.txt": "not an image",
            "nothing.png": "not an image",
            "small.png": "45 x 9 pixels, at least 13 a side are needed",
        }
        assert similarity.read_csv(tmp_path / "x.csv") == rows
        similarity.plot(rows, tmp_path / "x.png")
        assert (tmp_path / "x.png").stat().st_size > 10_000

    def test_a_method_gives_the_same_alone(self, folder):
        rows, _ = similarity.image_similarity(folder, [2])
        alone, _ = similarity.image_similarity(folder, [2], ["s3"])
        assert alone == [row for row in rows if row["method"] == "s3"]

    def test_an_interrupted_run_goes_on(self, folder, tmp_path, monkeypatch):
        path = tmp_path / "x.csv"
        rows, skipped = similarity.image_similarity(folder, [2], csv_file=path)
        whole = path.read_text()
        path.write_text(whole[: len(whole) * 3 // 4])  # killed in the middle of a line
        pooled = []
        original = similarity.pool_image
        monkeypatch.setattr(
            similarity, "pool_image", lambda *args: pooled.append(1) or original(*args)
        )
        again = similarity.image_similarity(folder, [2], csv_file=path, resume=True)
        assert again == (rows, skipped) and path.read_text() == whole
        assert 0 < len(pooled) < len(METHODS)

        pooled.clear()  # other settings are not these results
        similarity.image_similarity(folder, [2], scale=255.0, csv_file=path, resume=True)
        assert len(pooled) == 2 * len(METHODS)
        path.write_text("a,b\n1,2\n")
        with pytest.raises(ValueError, match=r"x\.csv is not a file of image_similarity"):
            similarity.image_similarity(folder, [2], csv_file=path, resume=True)

    def test_mistakes(self, folder, tmp_path):
        with pytest.raises(ValueError, match=f"no folder at {tmp_path}/missing"):
            similarity.image_similarity(tmp_path / "missing")
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match=r"no image to compare .*it is empty"):
            similarity.image_similarity(tmp_path / "empty")
        with pytest.raises(ValueError, match=r"no image to compare .*a\.png: 45 x 40 pixels"):
            similarity.image_similarity(folder, [5], match="pooled")
        with pytest.raises(ValueError, match="kernel must be at least 2, got 1"):
            similarity.image_similarity(folder, [1])


class TestPaper:
    @pytest.mark.skipif(not PAPER.exists(), reason=f"no text of the paper at {PAPER}")
    def test_tables_are_the_papers(self):
        lines = [" ".join(line.split()) for line in PAPER.read_text().splitlines()]
        for method, label in ROWS.items():
            numbers = [v for name in ("DIV2K", "Urban100", "Manga109") for v in
                       similarity.PAPER[name][method]]  # fmt: skip
            text = " ".join(f"{v:.3f}" for v in numbers)
            (line,) = [line for line in lines if line.endswith(text)]
            assert label in line
            times = benchmark.PAPER_LATENCY[method]
            cpu, cuda = ("{} / {}".format(*times[device]) for device in ("cpu", "cuda"))
            flickr = " ".join(f"{v:.3f}" for v in similarity.PAPER["Flickr2K"][method])
            squeezed = [line.replace(" ", "") for line in lines]
            assert any(
                line.endswith((cpu + cuda + flickr).replace(" ", "")) for line in squeezed
            ), method

    def test_soft_pool_is_first_in_every_column(self):
        for dataset in similarity.PAPER:
            for kernel in (2, 3, 5):
                for metric in similarity.METRICS:
                    values = {
                        m: similarity.paper_value(dataset, m, kernel, metric) for m in METHODS
                    }
                    assert similarity.ranks(values)["softpool"] == 1

    def test_its_own_numbers_correlate_with_it(self):
        rows = [
            dict(
                image="x",
                kernel=k,
                method=method,
                **{
                    metric: similarity.paper_value("DIV2K", method, k, metric)
                    for metric in similarity.METRICS
                },
            )
            for k in (2, 5)
            for method in METHODS
        ]
        comparison = similarity.compare_with_paper(rows)
        assert [(row["kernel"], row["metric"]) for row in comparison] == [
            (2, "ssim"), (2, "psnr"), (5, "ssim"), (5, "psnr"),
        ]  # fmt: skip
        for row in comparison:
            assert row["correlation"]["DIV2K"] == pytest.approx(1)
            assert row["places"]["softpool"] == 1 and row["better"] == row["images"] == 1
        assert comparison[0]["difference"] == pytest.approx(0.729 - 0.714)

    def test_other_kernels_have_no_number(self):
        assert similarity.paper_value("DIV2K", "average", 4, "ssim") is None
