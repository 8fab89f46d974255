"""Submissions to the COCO server: detections on test-dev, zipped and checked."""

import hashlib
import json
import os
import re
import zipfile
from pathlib import Path

import numpy as np
from mmengine.config import Config
from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.runner import Runner
from rich.progress import track

from ..engine import build_runner, coco_metrics, load_weights
from ..files import write_atomically

#: Number of images in test-dev2017.
TEST_DEV_IMAGES = 20288
#: Largest number of detections per image that the server evaluates.
MAX_DETECTIONS = 100
_FILE_NAME = re.compile(r"detections_test-dev2017_[\w.-]+_results")


def read_image_info(path) -> dict:
    """Reads the ``image_info_*.json`` of a COCO test set.

    Args:
        path (str | Path): The file; it has images and categories, and no annotations.

    Returns:
        dict: The content of the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is another kind of file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no image list of test-dev at {path.absolute()}; it is in image_info_test2017.zip on "
            "https://cocodataset.org/#download; ann_file says where it is"
        )
    try:
        info = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON, or is truncated: {error}") from error
    if not isinstance(info, dict) or not info.get("images") or not info.get("categories"):
        raise ValueError(f"{path} must have images and categories, as image_info_test-dev2017.json")
    if info.get("annotations"):
        raise ValueError(
            f"{path} has annotations, so it is not the image_info_test-dev2017.json of test-dev"
        )
    return info


def detect_test_dev(
    cfg: Config,
    checkpoint: str,
    name: str,
    ann_file,
    image_dir,
    part_size: int = 500,
) -> dict[str, Path]:
    """Runs a detector on test-dev and writes the zip files for the COCO server.

    The images are processed in parts. The results of every part are saved, so that the same call
    resumes an interrupted run at the first missing part.

    Args:
        cfg: The config, from :func:`mmsoftpool.engine.load_config`.
        checkpoint: File or URL of the detector's weights.
        name: Name of the algorithm, part of the file names: letters, digits and ``_.-``.
        ann_file (str | Path): ``image_info_test-dev2017.json``.
        image_dir (str | Path): The folder with its images.
        part_size: Number of images per part, at least 1. Defaults to 500.

    Returns:
        dict: The checked zip file of each metric (``bbox``, ``segm``) of the config's
        test_evaluator, ``WORK_DIR/test-dev/METRIC/detections_test-dev2017_NAME_results.zip``. Empty
        in all processes of a distributed run but the first.

    Raises:
        FileNotFoundError: If the image list, an image or the checkpoint is missing.
        ValueError: If an argument is wrong, the detector does not fit the data set, ``work_dir``
            has results of another run, or the check finds a fault.
    """
    file_name = f"detections_test-dev2017_{name}_results"
    if not _FILE_NAME.fullmatch(file_name):
        raise ValueError(f"name must have only letters, digits, '_', '.' and '-', got {name!r}")
    if part_size < 1:
        raise ValueError(f"part_size must be at least 1, got {part_size}")
    info = read_image_info(ann_file)
    missing = [
        i["file_name"] for i in info["images"] if not Path(image_dir, i["file_name"]).exists()
    ]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(info['images'])} images of {ann_file} are not in "
            f"{Path(image_dir).absolute()}, for example {missing[0]}; "
            "they are in test2017.zip on https://cocodataset.org/#download"
        )
    metrics = coco_metrics(cfg)
    folder = Path(cfg.work_dir, "test-dev")

    cfg.test_dataloader.dataset.update(
        data_root="",
        ann_file=str(Path(ann_file).absolute()),
        data_prefix=dict(img=str(Path(image_dir).absolute()) + "/"),
        indices=None,  # all images
    )
    cfg.test_dataloader.persistent_workers = False
    cfg.test_evaluator = dict(
        type="CocoMetric",
        metric=metrics,
        ann_file=str(ann_file),
        format_only=True,
        outfile_prefix=str(folder / "unfinished"),
    )
    runner = build_runner(cfg)
    load_weights(checkpoint, runner.load_checkpoint)
    dataset = runner.test_loop.dataloader.dataset
    classes, categories = dataset.metainfo["classes"], {c["name"] for c in info["categories"]}
    if set(classes) != categories:
        raise ValueError(
            f"the {len(classes)} classes of the detector must be the {len(categories)} of "
            f"{ann_file}; only one of them has {', '.join(sorted(set(classes) ^ categories)[:5])}"
        )
    starts = range(0, len(dataset), part_size)
    if is_main_process():
        _begin(folder, cfg, checkpoint, ann_file, part_size)
        print(f"{len(dataset)} images in {len(starts)} parts")
        if len(dataset) != TEST_DEV_IMAGES:
            print(f"note: the server's test-dev2017 has {TEST_DEV_IMAGES} images")
    todo = [
        [i for i in range(len(starts)) if not all(p.exists() for p in _parts(folder, i, metrics))]
    ]
    broadcast_object_list(todo)  # all processes follow the first one
    for i in todo[0]:
        if is_main_process():
            print(f"part {i + 1} of {len(starts)}", flush=True)
        indices = range(starts[i], min(starts[i] + part_size, len(dataset)))
        loader = dict(cfg.test_dataloader, dataset=dataset.get_subset(list(indices)))
        runner.test_loop.dataloader = Runner.build_dataloader(loader, seed=runner.seed)
        runner.test()
        if is_main_process():
            for metric, part in zip(metrics, _parts(folder, i, metrics), strict=True):
                _keep(folder / f"unfinished.{metric}.json", part, metric)
    if not is_main_process():
        return {}
    submissions = {}
    for metric in metrics:
        parts = [_parts(folder, i, [metric])[0] for i in range(len(starts))]
        submissions[metric] = _write(folder / metric / f"{file_name}.json", parts)
        # The detector has seen every image; any number of them may have no detection.
        print(check_submission(submissions[metric], ann_file, max_empty=len(dataset)))
    return submissions


def _parts(folder: Path, number: int, metrics: list[str]) -> list[Path]:
    return [folder / "parts" / f"{number:04d}.{metric}.json" for metric in metrics]


def _keep(unfinished: Path, part: Path, metric: str) -> None:
    """Renames the file that CocoMetric wrote to the results of a part."""
    if metric == "segm":
        # pycocotools would use the area of the box for the mask, which changes AP by size.
        detections = json.loads(unfinished.read_text())
        for detection in detections:
            del detection["bbox"]
        unfinished.write_text(json.dumps(detections))
    os.replace(unfinished, part)


def _begin(folder: Path, cfg: Config, checkpoint: str, ann_file, part_size: int) -> None:
    """Records the settings of a run in ``run.json``, or checks that they have not changed.

    Raises:
        ValueError: If the folder has results of a run with other settings.
    """
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    weights = Path(checkpoint)
    settings = dict(
        checkpoint=hashlib.sha256(weights.read_bytes()).hexdigest()
        if weights.is_file()
        else checkpoint,
        annotations=hashlib.sha256(Path(ann_file).read_bytes()).hexdigest(),
        part_size=part_size,
        model=json.dumps(cfg.model, sort_keys=True, default=str),
        pipeline=json.dumps(cfg.test_dataloader.dataset.pipeline, sort_keys=True, default=str),
    )
    record = folder / "run.json"
    if not record.exists():
        with write_atomically(record) as temporary:
            temporary.write_text(json.dumps(settings))
        return
    earlier = json.loads(record.read_text())
    changed = [key for key in settings if settings[key] != earlier.get(key)]
    if changed:
        raise ValueError(
            f"{folder} has results of a run with another {' and '.join(changed)}; delete it or "
            "choose another work_dir"
        )


def _write(path: Path, parts: list[Path]) -> Path:
    """Joins the lists in the files ``parts`` into the file ``path`` and zips it.

    Returns:
        The zip file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as temporary, temporary.open("w") as out:
        out.write("[")
        separator = ""
        for part in parts:  # as text, because the masks of 20 000 images are a gigabyte
            content = part.read_text().strip()[1:-1]
            if content:
                out.write(separator + content)
                separator = ","
        out.write("]")
    zipped = path.with_suffix(".zip")
    with (
        write_atomically(zipped) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        archive.write(path, path.name)
    return zipped


def check_submission(path, ann_file, max_empty: int = 0) -> str:
    """Checks a submission for every fault that makes the COCO server refuse or miscount it.

    Args:
        path (str | Path): ``detections_test-dev2017_NAME_results.json`` or the zip with it.
        ann_file (str | Path): ``image_info_test-dev2017.json``.
        max_empty: Number of images that may have no detection. Defaults to 0, because a truncated
            file lacks images.

    Returns:
        One line that describes the file.

    Raises:
        FileNotFoundError: If one of the files is missing.
        ValueError: If there are faults; the message has the number of each and an example.
    """
    path = Path(path)
    info = read_image_info(ann_file)
    detections = _read_submission(path)
    if not detections:
        raise ValueError(f"{path} has no detections")
    not_dicts = [d for d in detections if not isinstance(d, dict)]
    if not_dicts:
        raise ValueError(f"{path} must be a list of dicts, got {not_dicts[0]!r}")
    faults = _Faults(detections)
    kinds = [kind for kind in ("bbox", "segmentation") if kind in detections[0]]
    for key in ("image_id", "category_id", "score", *(kinds or ["bbox"])):
        faults.add(f"no {key}", [key not in d for d in detections])
    faults.report(path)  # the checks below need these keys

    images = {image["id"]: image for image in info["images"]}
    faults.add("image_id not in test-dev", [d["image_id"] not in images for d in detections])
    categories = {category["id"] for category in info["categories"]}
    faults.add("category_id not of COCO", [d["category_id"] not in categories for d in detections])
    faults.add(
        "score not a number from 0 to 1",
        [not (_is_number(d["score"]) and 0 <= d["score"] <= 1) for d in detections],
    )
    ids, counts = np.unique([d["image_id"] for d in detections], return_counts=True)
    crowded = set(ids[counts > MAX_DETECTIONS].tolist())
    faults.add(
        f"more than {MAX_DETECTIONS} detections in an image",
        [d["image_id"] in crowded for d in detections],
    )
    faults.report(path)
    empty = sorted(images.keys() - set(ids.tolist()))
    if len(empty) > max_empty:
        raise ValueError(
            f"{path} has detections for {len(ids)} of {len(images)} images, the first image "
            f"without is {empty[0]}; the file may be truncated (max_empty={len(empty)} if the "
            "detector found nothing there)"
        )
    if "bbox" in kinds:
        faults.add("bbox not finite and inside its image", _bad_boxes(detections, images))
    if "segmentation" in kinds:
        bad = [
            _is_bad_mask(d["segmentation"], images[d["image_id"]])
            for d in track(detections, description="masks")
        ]
        faults.add("segmentation not an RLE of its image's height and width", bad)
    faults.report(path)
    return (
        f"{path}: {len(detections)} detections ({' and '.join(kinds)}) in {len(ids)} of "
        f"{len(images)} images, ready for the server"
    )


def _read_submission(path: Path) -> list:
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path.absolute()}")
    if not _FILE_NAME.fullmatch(path.stem) or path.suffix not in (".json", ".zip"):
        raise ValueError(
            f"the file must be named detections_test-dev2017_NAME_results.json or .zip, got {path}"
        )
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                if archive.namelist() != [f"{path.stem}.json"]:
                    raise ValueError(
                        f"{path} must contain only {path.stem}.json, got {archive.namelist()}"
                    )
                content = archive.read(f"{path.stem}.json")
        else:
            content = path.read_bytes()
        detections = json.loads(content)
    except (zipfile.BadZipFile, ValueError) as error:
        raise ValueError(f"{path} is damaged or truncated: {error}") from error
    if not isinstance(detections, list):
        raise ValueError(f"{path} must be a list of detections, got a {type(detections).__name__}")
    return detections


class _Faults:
    """Collects the faults of a list of detections."""

    def __init__(self, detections: list):
        self.detections = detections
        self.lines = []

    def add(self, fault: str, wrong: list[bool]) -> None:
        """Adds a fault, given for each detection whether it has it."""
        where = np.flatnonzero(wrong)
        if len(where):
            example = json.dumps(self.detections[where[0]])
            self.lines.append(
                f"{fault}: {len(where)} times, the first is number {where[0]}, {example[:200]}"
            )

    def report(self, path) -> None:
        """Raises a ValueError with all faults, if there are any."""
        if self.lines:
            raise ValueError(f"{path} is not ready for the server: " + "; ".join(self.lines))


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and np.isfinite(value)


def _bad_boxes(detections: list, images: dict, tolerance: float = 0.5) -> list[bool]:
    """Finds the boxes (x, y, width, height) that are not inside their image, to half a pixel."""

    def bad(detection):
        box, image = detection["bbox"], images[detection["image_id"]]
        if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
            return True
        x, y, width, height = box
        return (
            min(width, height) < 0
            or min(x, y) < -tolerance
            or x + width > image["width"] + tolerance
            or y + height > image["height"] + tolerance
        )

    return [bad(detection) for detection in detections]


def _is_bad_mask(mask, image: dict) -> bool:
    size = [image["height"], image["width"]]
    if not isinstance(mask, dict) or mask.get("size") != size:
        return True
    if not isinstance(mask.get("counts"), str):
        return True
    runs = _run_lengths(mask["counts"])
    return runs is None or min(runs, default=0) < 0 or sum(runs) != size[0] * size[1]


def _run_lengths(counts: str) -> list[int] | None:
    """Reads the runs of an RLE string.

    pycocotools.mask.decode accepts runs that do not fill the image and leaves the rest of the mask
    uninitialized, so they are read here. Its maskApi.c defines the format: groups of 5 bits as
    characters from 48 on, the lowest group first; bit 6 is set if another group follows, and the
    highest bit of the last group is the sign. From the fourth run on, a number is the difference
    to the run two places before.

    Returns:
        The lengths of the runs, or None if the string is not valid.
    """
    runs, value, shift = [], 0, 0
    for character in counts:
        group = ord(character) - 48
        if not 0 <= group < 64:
            return None
        value |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return None if shift else runs
