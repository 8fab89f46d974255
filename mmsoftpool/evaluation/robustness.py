"""Robustness of trained detectors: their AP on corrupted images, over the sharpness alpha and with
plain remedies (Michaelis et al. 2019, "Benchmarking Robustness in Object Detection")."""

import itertools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import cv2
import numpy as np
from matplotlib.figure import Figure
from mmcv.transforms import BaseTransform
from mmengine.config import Config
from mmengine.runner import Runner
from scipy.stats import t

from .._openmmlab import end_workers
from ..errors import UserError
from ..files import write_text
from ..ops.modules import SoftPool2d
from ..pictures import colours, metric_label, save_figure
from ..replace import replace_pooling
from ..runner import load_model
from .scores import KeptScores, check_alphas, check_val, identify, load_runner, main_metric

#: The corruptions of the benchmark by their kind.
KINDS = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}
CORRUPTIONS = tuple(itertools.chain.from_iterable(KINDS.values()))
SEVERITIES = (1, 2, 3, 4, 5)
#: Plain remedies, applied to the corrupted image.
REMEDIES = {
    "none": lambda image: image,
    "gaussian": lambda image: cv2.GaussianBlur(image, (0, 0), 1.5),
    "median": lambda image: cv2.medianBlur(image, 3),
}


class Corruption(BaseTransform):
    """Corrupts an image, then applies a remedy.

    The noise of an image is the same in every evaluation.

    Attributes:
        name: One of :data:`CORRUPTIONS`. Defaults to None, the image as it is.
        severity: 1 to 5.
        remedy: A key of :data:`REMEDIES`. Defaults to ``'none'``.
    """

    name: str | None = None
    severity = 0
    remedy = "none"

    def transform(self, results: dict) -> dict:
        image = results["img"]
        if self.name is not None:
            from imagecorruptions import corrupt

            state = np.random.get_state()
            seed = zlib.crc32(f"{results.get('img_id')} {self.name} {self.severity}".encode())
            np.random.seed(seed)
            # These two have a generator of their own.
            own = dict(seed=seed) if self.name in ("impulse_noise", "glass_blur") else {}
            rgb = np.ascontiguousarray(image[..., ::-1])
            rgb = corrupt(rgb, corruption_name=self.name, severity=self.severity, **own)
            image = np.ascontiguousarray(rgb[..., ::-1])
            np.random.set_state(state)
        results["img"] = REMEDIES[self.remedy](image)
        return results


@dataclass(frozen=True)
class Robustness:
    """Result of :func:`evaluate_robustness`; all scores are of ``metric``, COCO's in percent.

    Attributes:
        metric: Name of the metric, such as ``'coco/bbox_mAP'``.
        corruptions: Names of the corruptions.
        severities: Their severities.
        clean: By the name of a detector or of one of its variants, (checkpoints,) scores on the
            images as they are.
        corrupted: By the same names, (checkpoints, corruptions, severities) scores.
        alphas: Values of alpha that a detector was evaluated with besides its own.
        remedies: Names of the remedies. The names of ``clean`` are those of every remedy for the
            first detector with its own alpha, with the next alpha, and so on; then of the next
            detector.
        data: Name of the data set, for the pictures.
    """

    metric: str
    corruptions: tuple[str, ...]
    severities: tuple[int, ...]
    clean: dict[str, np.ndarray]
    corrupted: dict[str, np.ndarray]
    alphas: tuple[float, ...] = ()
    remedies: tuple[str, ...] = ("none",)
    data: str = ""

    def columns(self, parts: dict[str, tuple[str, ...]]) -> dict[str, list[np.ndarray]]:
        """The scores of the checkpoints of each variant, by the name of a column.

        The mean performance under corruption (mPC) is the mean over all corruptions and severities,
        the relative one (rPC) its percentage of the clean score. ``parts`` has more columns, each
        the mean over some of the corruptions. If these are the corruptions themselves, the mean
        over all of them at each severity follows.
        """
        columns = {"clean": list(self.clean.values())}
        tables = self.corrupted.values()
        columns["mPC"] = [scores.mean((1, 2)) for scores in tables]
        with np.errstate(invalid="ignore", divide="ignore"):
            pairs = zip(columns["mPC"], columns["clean"], strict=True)
            columns["rPC, %"] = [100 * corrupted / clean for corrupted, clean in pairs]
        for name, members in parts.items():
            places = [self.corruptions.index(member) for member in members]
            columns[name] = [scores[:, places].mean((1, 2)) for scores in tables]
        if parts == self.each() and len(self.severities) > 1:
            for i, severity in enumerate(self.severities):
                columns[f"severity {severity}"] = [scores[..., i].mean(1) for scores in tables]
        return columns

    def each(self) -> dict[str, tuple[str, ...]]:
        """A part for each corruption, by its name in words."""
        return {name.replace("_", " "): (name,) for name in self.corruptions}

    def parts(self) -> dict[str, tuple[str, ...]]:
        """The kinds of corruptions where all were evaluated, else each corruption."""
        return KINDS if set(self.corruptions) == set(CORRUPTIONS) else self.each()

    def markdown(self) -> str:
        """Formats the means over the checkpoints as tables, with their 95 % intervals.

        The first has a row for each variant, and a column for each kind of corruption where all
        were evaluated. The second, then, has a row for each corruption and each severity.
        """
        label = metric_label(self.metric)
        rows = [[label, *self.clean]]
        for name, scores in self.columns(self.parts()).items():
            rows.append([name, *map(_with_interval, scores)])
        lines = _table(zip(*rows, strict=True))
        if self.parts() != self.each():
            rows = rows[:1]
            for name, scores in self.columns(self.each()).items():
                rows.append([name, *map(_with_interval, scores)])
            lines += ["", *_table(rows)]
        lines += ["", f"Means over {self._over()}."]
        if self._several():
            lines[-1] += " ±: 95 % interval of the mean over the checkpoints (Student's t)."
        return "\n".join(lines) + "\n"

    def _several(self) -> bool:
        return any(len(values) > 1 for values in self.clean.values())

    def _over(self) -> str:
        """What the means are over."""
        counts = sorted({len(values) for values in self.clean.values()})
        severities = ", ".join(map(str, self.severities))
        return f"checkpoints ({' or '.join(map(str, counts))}) and severities ({severities})"

    def _title(self) -> str:
        return ": ".join(filter(None, (self.data, f"means over {self._over()}")))

    def plot(self, out) -> None:
        """Draws every corruption and severity, with intervals, into the picture file ``out``.

        A colour is a detector, a shape one of its variants.
        """
        rows = self.columns(self.each())
        del rows["rPC, %"]
        height = 0.6 + (0.16 + 0.06 * len(self.clean)) * len(rows) + 0.2 * len(self.clean)
        figure = Figure(figsize=(6.4, height), layout="constrained")
        axes = figure.subplots()
        places = np.arange(len(rows))[::-1]
        variants = (1 + len(self.alphas)) * len(self.remedies)
        names = [n.removesuffix(f", {self.remedies[0]}") for n in list(self.clean)[::variants]]
        detectors = list(colours(names).values())
        for i, name in enumerate(self.clean):
            means = [scores[i].mean() for scores in rows.values()]
            spread = [_half_interval(scores[i]) for scores in rows.values()]
            shift = 0.4 - 0.8 * (i + 0.5) / len(self.clean)
            detector, variant = divmod(i, variants)
            style = dict(fmt="os^vDP*X"[variant % 8], color=detectors[detector], ms=4)
            axes.errorbar(means, places + shift, xerr=spread, label=name, **style)
        axes.set(
            yticks=places,
            yticklabels=list(rows),
            ylim=(-0.5, len(rows) - 0.5),
            xlabel=metric_label(self.metric) + self._several() * ", bars: 95 % intervals",
        )
        for place in places[::2]:
            axes.axhspan(place - 0.5, place + 0.5, color="0.95", lw=0, zorder=0)
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center", frameon=False)
        figure.suptitle(self._title(), fontsize=9)
        save_figure(figure, out)

    def plot_alphas(self, out) -> None:
        """Draws each detector with each alpha as heat maps into the picture file ``out``.

        A map is a column of the table; all are of the first remedy.
        """
        alphas, remedies = 1 + len(self.alphas), len(self.remedies)
        detectors = list(self.clean)[:: alphas * remedies]
        maps = self.columns(self.parts())
        del maps["rPC, %"]
        largest = max(values.mean() for scores in maps.values() for values in scores[::remedies])
        rows = -(-len(maps) // 2)
        size = (1.6 + 1.2 * alphas, rows * (0.9 + 0.25 * len(detectors)))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(rows, 2, squeeze=False, sharex=True, sharey=True)
        for ax, (name, scores) in itertools.zip_longest(
            axes.flat, maps.items(), fillvalue=("", ())
        ):
            if not name:
                ax.set_axis_off()
                continue
            means = np.array([values.mean() for values in scores[::remedies]])
            means = means.reshape(len(detectors), alphas)
            ax.imshow(means, aspect="auto", cmap="Blues", vmin=0, vmax=1.5 * largest or 1)
            for (y, x), mean in np.ndenumerate(means):
                ax.text(x, y, f"{mean:.1f}", ha="center", va="center", fontsize=8)
            ax.set_title(f"{metric_label(self.metric)}, {name}", fontsize=9)
            ax.set_xticks(range(alphas), ["its own", *(f"{alpha:g}" for alpha in self.alphas)])
            ax.set_yticks(range(len(detectors)), detectors)
        figure.supxlabel("α of the evaluation", fontsize=9)
        figure.suptitle(self._title(), fontsize=9)
        save_figure(figure, out)


def _table(rows) -> list[str]:
    """The lines of a table in Markdown; its first row is the header."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|---|" + "---:|" * (lines[0].count("|") - 2))
    return lines


def _with_interval(values: np.ndarray) -> str:
    mean = f"{values.mean():.1f}"
    return mean if len(values) < 2 else f"{mean} ± {_half_interval(values):.1f}"


def _half_interval(values: np.ndarray) -> float:
    """Half of the 95 % interval of a mean, 0 for a single value."""
    count = len(values)
    if count < 2:
        return 0.0
    return float(t.ppf(0.975, count - 1) * values.std(ddof=1) / count**0.5)


def evaluate_robustness(
    detectors: dict[str, tuple[Config, Sequence[str]]],
    work_dir: str | Path,
    *,
    alphas: Sequence[float] = (),
    corruptions: Sequence[str] = CORRUPTIONS,
    severities: Sequence[int] = SEVERITIES,
    remedies: Sequence[str] = ("none",),
    include="torch.nn.MaxPool2d",
) -> Robustness:
    """Evaluates trained detectors on corrupted images of their val splits.

    The scores are kept in ``robustness.json`` in ``work_dir``. A later call takes from there what
    has the same config, weights and settings, and evaluates the rest.

    Args:
        detectors: Configs, from :func:`~mmsoftpool.config.load_config`, each with files or URLs of
            its checkpoints, such as those of several seeds, by a name for the table.
        work_dir: The folder for the results.
        alphas: Values of alpha that each detector is evaluated with as well, without training: its
            SoftPool gets another alpha; where it has none, SoftPool takes the place of the pools of
            the backbone that ``include`` names. Defaults to none.
        corruptions: Names among :data:`CORRUPTIONS`. Defaults to all.
        severities: Numbers from 1 to 5. Defaults to all.
        remedies: Keys of :data:`REMEDIES`; the detectors are evaluated after each. Defaults to
            ``'none'`` alone.
        include: See :func:`~mmsoftpool.replace_pooling`. Defaults to ``'torch.nn.MaxPool2d'``.

    Returns:
        The scores, also written to ``robustness.md`` and ``robustness.png`` in ``work_dir``, and
        with ``alphas`` to ``robustness_alphas.png``.

    Raises:
        FileNotFoundError: If the data set or a checkpoint is missing.
        UserError: If an argument is out of its range, the package imagecorruptions is missing, a
            checkpoint does not fit its config, or the config lacks a part that is needed.
    """
    try:
        version("imagecorruptions-imaug")  # imagecorruptions itself takes no seed
    except PackageNotFoundError as error:
        message = "robustness needs imagecorruptions: pip install imagecorruptions-imaug"
        raise UserError(message) from error
    check_alphas(alphas)
    for name, values, allowed in (
        ("corruptions", corruptions, CORRUPTIONS),
        ("severities", severities, SEVERITIES),
        ("remedies", remedies, tuple(REMEDIES)),
    ):
        if not values or len(set(values)) != len(values) or not set(values) <= set(allowed):
            raise UserError(f"{name} must be different ones of {allowed}, got {list(values)}")
    work_dir = Path(work_dir)
    known = KeptScores(work_dir / "robustness.json")
    for cfg, checkpoints in detectors.values():  # mistakes are found before the first evaluation
        if not checkpoints:
            raise UserError("checkpoints must be at least one file or URL, got none")
        runner = check_val(cfg)
        _insert_corruption(runner)
        data = Path(getattr(runner.val_dataloader.dataset, "data_root", None) or "").name
        for checkpoint in checkpoints:
            _soft_pools(load_model(cfg, checkpoint), include, bool(alphas))

    conditions = [(None, 0), *itertools.product(corruptions, severities)]
    variants = list(itertools.product((None, *alphas), remedies))
    total = len(conditions) * len(variants) * sum(len(files) for _, files in detectors.values())
    number, found = 0, {}
    for name, (cfg, checkpoints) in detectors.items():
        for checkpoint in checkpoints:
            identity, runner = identify(cfg, checkpoint, include), None
            for alpha, remedy in variants:
                column = name if alpha is None else f"{name} → α = {alpha:g}"
                column += "" if remedy == "none" else f", {remedy}"
                scores = []
                for corruption, severity in conditions:
                    number += 1
                    key = f"{identity} alpha={alpha} remedy={remedy} {corruption} {severity}"
                    if key not in known:
                        if runner is None:
                            runner = load_runner(cfg, checkpoint)
                            transform, pools = _insert_corruption(runner), []
                        if alpha is not None:
                            pools = pools or _soft_pools(runner.model, include, True)
                        for pool in pools:
                            pool.alpha = alpha
                        transform.name, transform.severity = corruption, severity
                        transform.remedy = remedy
                        end_workers(runner.val_dataloader)
                        title = f"{corruption} {severity}" if corruption else "clean"
                        print(f"== {number} of {total}: {column}, {checkpoint}, {title}")
                    scores.append(known.get(key, lambda runner=runner: runner.val()))
                found.setdefault(column, []).append(scores)
    metric, table = main_metric(list(itertools.chain.from_iterable(found.values())))
    ends = np.cumsum([len(rows) for rows in found.values()])
    tables = dict(zip(found, np.split(table, ends[:-1]), strict=True))
    shape = (-1, len(corruptions), len(severities))
    result = Robustness(
        metric=metric,
        corruptions=tuple(corruptions),
        severities=tuple(severities),
        clean={column: table[:, 0] for column, table in tables.items()},
        corrupted={column: table[:, 1:].reshape(shape) for column, table in tables.items()},
        alphas=tuple(alphas),
        remedies=tuple(remedies),
        data=data,
    )
    write_text(work_dir / "robustness.md", result.markdown())
    result.plot(work_dir / "robustness.png")
    if alphas:
        result.plot_alphas(work_dir / "robustness_alphas.png")
    return result


def _soft_pools(model, include, needed: bool) -> list:
    """The SoftPools of a detector, which take the place of other pools where there are none."""
    pools = [module for module in model.modules() if isinstance(module, SoftPool2d)]
    if needed and not pools:
        pools = list(replace_pooling(model.backbone, include=include).values())
    return pools


def _insert_corruption(runner: Runner) -> Corruption:
    """Puts the corruption behind the loading of the images of the val split."""
    dataset = runner.val_dataloader.dataset
    transforms = getattr(getattr(dataset, "pipeline", None), "transforms", [])
    for i, transform in enumerate(transforms):
        if type(transform).__name__.startswith("LoadImage"):
            transforms.insert(i + 1, Corruption())
            return transforms[i + 1]
    raise UserError(
        "val_dataloader.dataset must have a pipeline that loads images, got "
        f"{[type(transform).__name__ for transform in transforms]} in {type(dataset).__name__}"
    )
