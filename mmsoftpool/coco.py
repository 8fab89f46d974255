"""COCO's annotation and result files, with all of their faults reported at once."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from .errors import UserError
from .files import is_number, read_json


class Faults:
    """Collects the faults of the entries of a list in a file.

    Args:
        source (str): Start of the message, such as ``'x.json is not a result file'``.
        entries (list): The list.
    """

    def __init__(self, source: str, entries: list):
        self.source, self.entries, self.lines = source, entries, []

    def add(self, fault: str, wrong: Iterable[bool]) -> None:
        """Adds a fault, given for each entry whether it has it."""
        where = np.flatnonzero(list(wrong))
        if len(where):
            example = json.dumps(self.entries[where[0]])
            self.lines.append(
                f"{fault}: {len(where)} times, the first is number {where[0]}, {example[:200]}"
            )

    def report(self) -> None:
        """Raises a UserError with all faults, if there are any."""
        if self.lines:
            raise UserError(f"{self.source}: " + "; ".join(self.lines))

    def require(self, *keys: str) -> None:
        """Reports entries that are not dicts, or lack one of the keys."""
        self.add("not a dict", [not isinstance(entry, dict) for entry in self.entries])
        self.report()
        for key in keys:
            self.add(f"no {key}", [key not in entry for entry in self.entries])
        self.report()


def is_box(value) -> bool:
    """Whether a value is a box: x, y, width and height, finite, of no negative size."""
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(map(is_number, value))
        and min(value[2:]) >= 0
    )


def read_annotations(path: str | Path, what: str, advice: str = "") -> dict:
    """Reads a file in COCO's annotation format; annotations are optional, as for a test set.

    Args:
        path: The file.
        what: Its description in the error messages, such as ``'annotation file'``.
        advice: Appended to the message if there is no such file. Defaults to none.

    Raises:
        OSError: If there is no such file, or it cannot be read.
        UserError: If it has another format; the message has the number of each fault and an
            example.
    """
    data = read_json(path, what, advice)
    missing = [
        key
        for key in ("images", "categories", "annotations")
        if not isinstance(data, dict)
        or not isinstance(data.get(key, [] if key == "annotations" else None), list)
    ]
    if missing:
        raise UserError(
            f"{path} is not in COCO's annotation format: it must have a list of "
            f"{' and one of '.join(missing)}"
        )
    for key, names in (("images", ("file_name", "height", "width")), ("categories", ("name",))):
        entries = data[key]
        faults = Faults(f"the {key} in {path} are not in COCO's format", entries)
        faults.require("id", *names)
        faults.add("id not an integer", [type(entry["id"]) is not int for entry in entries])
        for name in names:
            kind, allowed = (str, "a text") if "name" in name else (int, "a positive integer")
            wrong = [type(e[name]) is not kind for e in entries]
            if kind is int:  # from 2**31 on, no image has this size and arithmetic may overflow
                wrong = [w or not 0 < e[name] < 2**31 for w, e in zip(wrong, entries, strict=True)]
            faults.add(f"{name} not {allowed}", wrong)
        faults.report()
        first = {entry["id"]: i for i, entry in reversed(list(enumerate(entries)))}
        faults.add("id used twice", [first[e["id"]] != i for i, e in enumerate(entries)])
        faults.report()

    objects = data.get("annotations", [])
    faults = Faults(f"the annotations in {path} are not in COCO's format", objects)
    faults.require("id", "image_id", "category_id", "bbox", "area")
    for key, entries in (("image_id", "images"), ("category_id", "categories")):
        known = {entry["id"] for entry in data[entries]}
        faults.add(
            f"{key} not in {entries}",
            [type(a[key]) is not int or a[key] not in known for a in objects],
        )
    faults.add("id not an integer", [type(a["id"]) is not int for a in objects])
    faults.add("bbox not x, y, width, height", [not is_box(a["bbox"]) for a in objects])
    faults.add("area not a number", [not is_number(a["area"]) for a in objects])
    faults.add("iscrowd not 0 or 1", [a.get("iscrowd", 0) not in (0, 1) for a in objects])
    faults.report()
    return data


def check_evaluable(data: dict, path: str | Path, masks: bool = False) -> None:
    """Checks that annotations have all that pycocotools needs for an evaluation.

    Args:
        data: The content of the file, from :func:`read_annotations`.
        path: The file, for the messages.
        masks: Whether masks are evaluated. Defaults to False, only boxes.

    Raises:
        UserError: If a required field is missing or wrong.
    """
    objects = data.get("annotations")
    if not objects:
        raise UserError(f"{path} has no annotations to compare detections with")
    faults = Faults(f"the annotations in {path} cannot be evaluated", objects)
    faults.require("iscrowd", *(["segmentation"] if masks else []))
    if masks:
        sizes = {image["id"]: (image["height"], image["width"]) for image in data["images"]}
        faults.add(
            "segmentation neither polygons near its image nor an RLE of its height and width",
            [
                not (
                    _is_polygons(a["segmentation"], sizes[a["image_id"]])
                    or is_mask(a["segmentation"], sizes[a["image_id"]])
                )
                for a in objects
            ],
        )
    faults.report()


def _is_polygons(value, size: tuple[int, int]) -> bool:
    """Whether a value is polygons that reach at most the image's size beyond its borders.

    pycocotools takes memory for every pixel of an outline, however far away.
    """
    height, width = size
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(polygon, list) and len(polygon) >= 6 for polygon in value)
        and all(len(polygon) % 2 == 0 and all(map(is_number, polygon)) for polygon in value)
        and all(-width <= x <= 2 * width for polygon in value for x in polygon[::2])
        and all(-height <= y <= 2 * height for polygon in value for y in polygon[1::2])
    )


def is_mask(value, size: tuple[int, int]) -> bool:
    """Whether a value is an RLE, its runs listed or as a string, that fills an image.

    With runs that do not fill the image, pycocotools loops forever when it compares two masks, and
    leaves the rest of a decoded one uninitialized; it has no check of its own.

    Args:
        value: The value.
        size: Height and width of the image.
    """
    if not isinstance(value, dict) or value.get("size") != list(size):
        return False
    runs = value.get("counts")
    if isinstance(runs, str):
        runs = run_lengths(runs)
    if not isinstance(runs, list) or not all(type(run) is int and run >= 0 for run in runs):
        return False
    return sum(runs) == size[0] * size[1]


def run_lengths(counts: str) -> list[int] | None:
    """Reads the runs of an RLE string.

    pycocotools' maskApi.c defines the format: groups of 5 bits as characters from 48 on, the lowest
    group first; bit 6 is set if another group follows, and the highest bit of the last group is the
    sign. From the fourth run on, a number is the difference to the run two places before.

    Returns:
        The lengths of the runs, or None if the string is not valid.
    """
    groups = np.array([ord(character) - 48 for character in counts], np.int64)
    if not len(groups) or ((groups < 0) | (groups > 63)).any() or groups[-1] & 32:
        return None
    last = (groups & 32) == 0
    starts = np.append(0, np.flatnonzero(last)[:-1] + 1)
    number = np.cumsum(last) - last  # the run that each group belongs to
    shift = 5 * (np.arange(len(groups)) - starts[number])
    if shift.max() > 30:  # more than 2^35 elements
        return None
    values = np.add.reduceat((groups & 31) << shift, starts)
    negative = (groups[last] & 16) != 0
    values[negative] -= 1 << (shift[last][negative] + 5)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values.tolist()
