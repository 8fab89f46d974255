"""Submissions to the COCO server: detections on test-dev, written, zipped and checked."""

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

#: Images of the whole test-dev2017.
TEST_DEV_IMAGES = 20288
#: The server counts no more detections of an image than these.
MAX_DETECTIONS = 100
_FILE_NAME = re.compile(r"detections_test-dev2017_[\w.-]+_results")


def read_image_info(path) -> dict:
    """Reads the ``image_info_*.json`` of a COCO test set.

    Args:
        path (str | Path): The file; it has images and categories, and no annotations.

    Raises:
        ValueError: If it is missing or is another kind of file.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"no image list of test-dev at {path.absolute()}; it is in image_info_test2017.zip of "
            "https://cocodataset.org/#download; name it with --ann-file"
        )
    try:
        info = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON, or is cut off: {error}") from error
    if not isinstance(info, dict) or not info.get("images") or not info.get("categories"):
        raise ValueError(f"{path} must have images and categories, as image_info_test-dev2017.json")
    if info.get("annotations"):
        raise ValueError(
            f"{path} has annotations, so it is not test-dev's image_info_test-dev2017.json"
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
    """Runs a detector on test-dev and writes what the COCO server takes.

    The images are taken in parts. The results of a part are kept, so that an interrupted run goes
    on with the first part that is missing.

    Args:
        cfg: The config, from :func:`mmsoftpool.engine.load_config`.
        checkpoint: File or URL of the detector's weights.
        name: Of the algorithm, in the names of the files: letters, digits and ``_.-``.
        ann_file (str | Path): ``image_info_test-dev2017.json``.
        image_dir (str | Path): The folder with its images.
        part_size: Images of a part. Defaults to 500.

    Returns:
        dict: For each metric of the config's test_evaluator (``bbox``, ``segm``) the zip file,
        ``WORK_DIR/test-dev/METRIC/detections_test-dev2017_NAME_results.zip``, checked. Empty in all
        processes of a distributed run but the first.

    Raises:
        ValueError: If something is missing, does not fit, or the check finds a fault.
    """
    file_name = f"detections_test-dev2017_{name}_results"
    if not _FILE_NAME.fullmatch(file_name):
        raise ValueError(f"--name must be of letters, digits and _.- only, got {name!r}")
    if part_size < 1:
        raise ValueError(f"--part-size must be at least 1, got {part_size}")
    info = read_image_info(ann_file)
    missing = [
        i["file_name"] for i in info["images"] if not Path(image_dir, i["file_name"]).exists()
    ]
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(info['images'])} images of {ann_file} are not in "
            f"{Path(image_dir).absolute()}, for example {missing[0]}; "
            "they are in test2017.zip of https://cocodataset.org/#download"
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
            f"the detector's {len(classes)} classes are not the {len(categories)} of {ann_file}: "
            f"{', '.join(sorted(set(classes) ^ categories)[:5])} ... are in one of them only"
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
    broadcast_object_list(todo)  # what the first process sees, for all of them
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
        # Every image has been through the detector; those where it found nothing are in no file.
        print(check_submission(submissions[metric], ann_file, max_empty=len(dataset)))
    return submissions


def _parts(folder: Path, number: int, metrics: list[str]) -> list[Path]:
    return [folder / "parts" / f"{number:04d}.{metric}.json" for metric in metrics]


def _keep(unfinished: Path, part: Path, metric: str) -> None:
    """Makes what CocoMetric wrote the results of a part."""
    if metric == "segm":
        # With a box, pycocotools takes its area for the mask's, which changes AP by size.
        detections = json.loads(unfinished.read_text())
        for detection in detections:
            del detection["bbox"]
        unfinished.write_text(json.dumps(detections))
    os.replace(unfinished, part)


def _begin(folder: Path, cfg: Config, checkpoint: str, ann_file, part_size: int) -> None:
    """Notes what the parts in ``folder`` belong to, or checks that it is what is noted there."""
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
    noted = folder / "run.json"
    if not noted.exists():
        noted.write_text(json.dumps(settings))
        return
    earlier = json.loads(noted.read_text())
    changed = [key for key in settings if settings[key] != earlier.get(key)]
    if changed:
        raise ValueError(
            f"{folder} has results of a run with another {' and '.join(changed)}; delete it or "
            "name another --work-dir"
        )


def _write(path: Path, parts: list[Path]) -> Path:
    """Joins the lists in the files ``parts`` and zips them, each in one step.

    Returns:
        The zip file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    with partial.open("w") as out:
        out.write("[")
        separator = ""
        for part in parts:  # as text: the masks of 20 000 images are a gigabyte
            content = part.read_text().strip()[1:-1]
            if content:
                out.write(separator + content)
                separator = ","
        out.write("]")
    partial.replace(path)
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(path, path.name)
    partial.replace(path.with_suffix(".zip"))
    return path.with_suffix(".zip")


def check_submission(path, ann_file, max_empty: int = 0) -> str:
    """Checks a file for the COCO server: everything that makes the server refuse or miscount it.

    Args:
        path (str | Path): ``detections_test-dev2017_NAME_results.json`` or the zip with it.
        ann_file (str | Path): ``image_info_test-dev2017.json``.
        max_empty: Images that may be without a detection. Defaults to 0: a file that was cut off
            lacks images.

    Returns:
        One line that says what the file has.

    Raises:
        ValueError: With all faults that were found, an example for each.
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
    faults.report(path)  # the rest needs the keys

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
            f"{path} has detections for {len(ids)} of {len(images)} images, the first without is "
            f"{empty[0]}; is the file cut off? (--max-empty {len(empty)} if the detector found "
            "nothing there)"
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
        f"{len(images)} images, fit for the server"
    )


def _read_submission(path: Path) -> list:
    if not path.is_file():
        raise ValueError(f"no file at {path.absolute()}")
    if not _FILE_NAME.fullmatch(path.stem) or path.suffix not in (".json", ".zip"):
        raise ValueError(
            f"the file must be called detections_test-dev2017_NAME_results.json or .zip, got {path}"
        )
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                if archive.namelist() != [f"{path.stem}.json"]:
                    raise ValueError(
                        f"{path} must hold {path.stem}.json alone, got {archive.namelist()}"
                    )
                content = archive.read(f"{path.stem}.json")
        else:
            content = path.read_bytes()
        detections = json.loads(content)
    except (zipfile.BadZipFile, ValueError) as error:
        raise ValueError(f"{path} is damaged or cut off: {error}") from error
    if not isinstance(detections, list):
        raise ValueError(f"{path} must be a list of detections, got a {type(detections).__name__}")
    return detections


class _Faults:
    """Collects what is wrong with a list of detections."""

    def __init__(self, detections: list):
        self.detections = detections
        self.lines = []

    def add(self, fault: str, wrong) -> None:
        where = np.flatnonzero(wrong)
        if len(where):
            example = json.dumps(self.detections[where[0]])
            self.lines.append(
                f"{fault}: {len(where)} times, the first is number {where[0]}, {example[:200]}"
            )

    def report(self, path) -> None:
        if self.lines:
            raise ValueError(f"{path} is not fit for the server:\n  " + "\n  ".join(self.lines))


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and np.isfinite(value)


def _bad_boxes(detections: list, images: dict, tolerance: float = 0.5) -> list[bool]:
    """Which boxes (x, y, width, height) are not inside their image, to half a pixel."""

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
    """The runs of an RLE string, None if it ends inside a number.

    pycocotools.mask.decode takes runs that do not fill the image and leaves the rest of the mask
    to chance, so they are read here, as its maskApi.c defines them: groups of 5 bits from character
    48 on, lowest first, bit 6 where another follows, the last group's highest bit the sign; from
    the fourth run on the difference to the run before the last.
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
