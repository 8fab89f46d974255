"""Submissions to the COCO server: detections on test-dev, zipped and checked."""

import json
import os
import re
import zipfile
from collections import Counter, defaultdict
from heapq import nlargest
from itertools import chain
from operator import itemgetter
from pathlib import Path

from mmengine.config import Config
from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.runner import Runner

from ..coco import RLE, check_entries, is_box, is_number, is_one_of, is_rle, read_annotations
from ..config import coco_metrics, require
from ..errors import UserError
from ..files import check_input, file_hash, parse_json, read_json, write_atomically, write_text
from ..runner import build_runner, load_weights

#: Number of images in test-dev2017.
TEST_DEV_IMAGES = 20288
#: Largest number of detections per image that the server evaluates.
MAX_DETECTIONS = 100
#: Largest size of an unpacked submission: three times that of 100 masks in every image.
MAX_BYTES = 4 * 2**30
_FILE_NAME = re.compile(r"detections_test-dev2017_[\w.-]+_results")


def read_image_info(path) -> dict:
    """Reads the ``image_info_*.json`` of a COCO test set.

    Args:
        path (str | Path): The file; it has images and categories, and no annotations.

    Returns:
        dict: The content of the file.

    Raises:
        FileNotFoundError: If there is no such file.
        UserError: If it is another kind of file.
    """
    info = read_annotations(
        path,
        "image list of test-dev",
        "; it is in image_info_test2017.zip on https://cocodataset.org/#download; set ann_file to "
        "its path",
    )
    if not info["images"] or not info["categories"]:
        raise UserError(f"{path} must have images and categories, as image_info_test-dev2017.json")
    if info.get("annotations"):
        raise UserError(
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
        cfg: The config, from :func:`mmsoftpool.config.load_config`.
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
        UserError: If an argument is wrong, the detector does not fit the data set, ``work_dir``
            has results of another run, or the check finds a fault.
    """
    file_name = f"detections_test-dev2017_{name}_results"
    if not _FILE_NAME.fullmatch(file_name):
        raise UserError(f"name must have only letters, digits, '_', '.' and '-', got {name!r}")
    if part_size < 1:
        raise UserError(f"part_size must be at least 1, got {part_size}")
    require(cfg, "test_dataloader.dataset", "test_dataloader.dataset.pipeline", "test_cfg")
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
    cfg.load_from = checkpoint
    runner = build_runner(cfg)
    load_weights(runner.model, checkpoint)  # mmengine only logs what does not fit
    dataset = runner.test_loop.dataloader.dataset
    classes, categories = dataset.metainfo["classes"], {c["name"] for c in info["categories"]}
    if set(classes) != categories:
        raise UserError(
            f"the {len(classes)} classes of the detector must be the {len(categories)} of "
            f"{ann_file}; only one of them has {', '.join(sorted(set(classes) ^ categories)[:5])}"
        )
    starts = range(0, len(dataset), part_size)
    if is_main_process():
        _begin(folder, cfg, checkpoint, ann_file, part_size)
        print(f"{len(dataset)} images in {len(starts)} parts")
    # All processes follow the first one.
    done = [[all(p.exists() for p in _parts(folder, i, metrics)) for i in range(len(starts))]]
    broadcast_object_list(done)
    for i, start in enumerate(starts):
        if done[0][i]:
            continue
        if is_main_process():
            print(f"part {i + 1} of {len(starts)}", flush=True)
        indices = range(start, min(start + part_size, len(dataset)))
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
    """Makes the file that CocoMetric wrote the results of a part: the best of each image."""
    images = defaultdict(list)
    for detection in json.loads(unfinished.read_text()):
        if metric == "segm":
            # pycocotools would use the area of the box for the mask, which changes AP by size.
            del detection["bbox"]
        images[detection["image_id"]].append(detection)
    best = (nlargest(MAX_DETECTIONS, found, itemgetter("score")) for found in images.values())
    unfinished.write_text(json.dumps(list(chain.from_iterable(best))))
    os.replace(unfinished, part)


def _begin(folder: Path, cfg: Config, checkpoint: str, ann_file, part_size: int) -> None:
    """Records the settings of a run in ``run.json``, or checks that they have not changed."""
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    weights = file_hash(checkpoint) if Path(checkpoint).is_file() else checkpoint
    settings = dict(
        checkpoint=weights,
        annotations=file_hash(ann_file),
        part_size=part_size,
        model=json.dumps(cfg.model, sort_keys=True, default=str),
        pipeline=json.dumps(cfg.test_dataloader.dataset.pipeline, sort_keys=True, default=str),
    )
    record = folder / "run.json"
    if not record.exists():
        write_text(record, json.dumps(settings))
        return
    earlier = read_json(record, "record of the run")
    if not isinstance(earlier, dict):
        raise UserError(f"{record} must hold the settings of a run, got {earlier!r}")
    changed = [key for key in settings if settings[key] != earlier.get(key)]
    if changed:
        raise UserError(
            f"{folder} has results of a run with another {' and '.join(changed)}; delete it or "
            "choose another work_dir"
        )


def _write(path: Path, parts: list[Path]) -> Path:
    """Joins the lists in the files ``parts`` into the file ``path``; returns that zipped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as temporary, temporary.open("w") as out:
        # As text, because the masks of 20 000 images are a gigabyte.
        contents = (part.read_text().strip()[1:-1] for part in parts)
        out.write("[")
        for number, content in enumerate(filter(None, contents)):
            out.write("," * (number > 0) + content)
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
        UserError: If there are faults; the message has the number of each and an example.
    """
    path = Path(path)
    info = read_image_info(ann_file)
    detections = _read_submission(path)
    if not detections:
        raise UserError(f"{path} has no detections")
    keys = {key for d in detections if isinstance(d, dict) for key in d}
    kinds = [kind for kind in ("bbox", "segmentation") if kind in keys]
    images = {image["id"]: image for image in info["images"]}
    is_image = is_one_of(images)
    is_category = is_one_of({category["id"] for category in info["categories"]})
    rules = {
        "image_id in test-dev": lambda d: is_image(d["image_id"]),
        "category_id of COCO": lambda d: is_category(d["category_id"]),
        "score from 0 to 1": lambda d: is_number(d["score"]) and 0 <= d["score"] <= 1,
        "bbox inside its image": lambda d: _is_inside(d["bbox"], images[d["image_id"]]),
        RLE: lambda d: is_rle(d["segmentation"], images[d["image_id"]]),
    }
    if "segmentation" not in kinds:
        del rules[RLE]
    elif "bbox" not in kinds:
        del rules["bbox inside its image"]
    check_entries(f"{path} is not ready for the server", detections, rules)
    counts = Counter(d["image_id"] for d in detections)
    (largest, count), *_ = counts.most_common()
    if count > MAX_DETECTIONS:
        raise UserError(
            f"{path} must have at most {MAX_DETECTIONS} detections in an image, got {count} in "
            f"image {largest}"
        )
    empty = sorted(images.keys() - counts.keys())
    if len(empty) > max_empty:
        raise UserError(
            f"{path} has detections for {len(counts)} of {len(images)} images, the first image "
            f"without is {empty[0]}; the file may be truncated (max_empty={len(empty)} if the "
            "detector found nothing there)"
        )
    ready = "ready for the server"
    if len(images) != TEST_DEV_IMAGES:
        ready = f"but the server's test-dev2017 has {TEST_DEV_IMAGES} images"
    return (
        f"{path}: {len(detections)} detections ({' and '.join(kinds)}) in {len(counts)} of "
        f"{len(images)} images, {ready}"
    )


def _read_submission(path: Path) -> list:
    check_input(path, "file")
    if not _FILE_NAME.fullmatch(path.stem) or path.suffix not in (".json", ".zip"):
        raise UserError(
            f"the file must be named detections_test-dev2017_NAME_results.json or .zip, got {path}"
        )
    content = _read_zip(path) if path.suffix == ".zip" else path.read_bytes()
    detections = parse_json(content, path)
    if not isinstance(detections, list):
        raise UserError(f"{path} must be a list of detections, got a {type(detections).__name__}")
    return detections


def _read_zip(path: Path) -> bytes:
    """Reads the only file in a zip file, which must be the JSON file of the same name."""
    name = f"{path.stem}.json"
    try:
        with zipfile.ZipFile(path) as archive:
            files = {file.filename: file.file_size for file in archive.infolist()}
            content = archive.read(name) if files.get(name, MAX_BYTES) < MAX_BYTES else None
    # Damage raises BadZipFile, zlib.error, EOFError; encryption RuntimeError; and there are others.
    except Exception as error:
        raise UserError(
            f"{path} is damaged or truncated, or not a plain zip file: {error}"
        ) from error
    if list(files) != [name]:
        raise UserError(f"{path} must contain only {name}, got {list(files)}")
    if content is None:
        raise UserError(
            f"{path} must unpack to less than {MAX_BYTES} bytes, got {files[name]} bytes"
        )
    return content


def _is_inside(box, image: dict, tolerance: float = 0.5) -> bool:
    """Whether a value is a box inside its image, to half a pixel."""
    if not is_box(box):
        return False
    x, y, width, height = box
    return (
        min(x, y) >= -tolerance
        and min(width, height) >= 0
        and x + width <= image["width"] + tolerance
        and y + height <= image["height"] + tolerance
    )
