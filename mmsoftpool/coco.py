"""COCO's annotation and result files, checked before pycocotools reads them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .errors import UserError
from .files import read_json


def check_entries(source: str, entries: list, rules: dict[str, Callable[[dict], bool]]) -> None:
    """Checks the entries of a list in a file; a UserError counts those that break a rule.

    The message starts with ``source``. ``rules`` are what every entry must have, each with a
    function that returns whether it does, or fails because an entry has another form.
    """

    def holds(rule, entry) -> bool:
        try:
            return rule(entry)
        except (AttributeError, LookupError, TypeError, ValueError):
            return False

    for name, rule in rules.items():
        wrong = [number for number, entry in enumerate(entries) if not holds(rule, entry)]
        if wrong:
            raise UserError(
                f"{source}: {len(wrong)} of {len(entries)} have no {name}, the first is number "
                f"{wrong[0]}, {json.dumps(entries[wrong[0]])[:200]}"
            )


def is_number(value) -> bool:
    """Whether a value of a JSON file is a finite number: no bool, within the range of float64."""
    return type(value) in (int, float) and -1.7e308 < value < 1.7e308


def is_box(value) -> bool:
    """Whether a value is x, y, width and height, finite numbers.

    The size may be negative: in the boxes of detectors it is, by rounding.
    """
    return isinstance(value, list) and len(value) == 4 and all(map(is_number, value))


def is_one_of(known) -> Callable[[object], bool]:
    """A function that returns whether a value is an integer and in ``known``."""
    return lambda value: type(value) is int and value in known


def _is_new(value, known: set) -> bool:
    """Whether a value is an integer that is not in ``known``, where it is from then on."""
    return type(value) is int and not (value in known or known.add(value))


def read_annotations(path: str | Path, what: str, advice: str = "") -> dict:
    """Reads a file in COCO's annotation format; without annotations, as for a test set, too."""
    data = read_json(path, what, advice)
    content = {"annotations": [], **data} if isinstance(data, dict) else {}
    lists = ("images", "categories", "annotations")
    if not all(isinstance(content.get(key), list) for key in lists):
        raise UserError(
            f"{path} is not in COCO's annotation format: it must have lists of images and of "
            "categories and, if there are any, of annotations"
        )
    image_ids, category_ids = set(), set()  # those that the first rules have passed
    is_image, is_category = is_one_of(image_ids), is_one_of(category_ids)
    rules = {
        "images": {
            "id of its own, an integer": lambda image: _is_new(image["id"], image_ids),
            "file_name, a text": lambda image: isinstance(image["file_name"], str),
            # From 2**31 on, no image has this size and arithmetic may overflow.
            "height and width, positive integers": lambda image: all(
                type(image[side]) is int and 0 < image[side] < 2**31 for side in ("height", "width")
            ),
        },
        "categories": {
            "id of its own, an integer": lambda category: _is_new(category["id"], category_ids),
            "name, a text": lambda category: isinstance(category["name"], str),
        },
        "annotations": {
            "id, an integer": lambda a: type(a["id"]) is int,
            "image_id of one of the images": lambda a: is_image(a["image_id"]),
            "category_id of one of the categories": lambda a: is_category(a["category_id"]),
            "bbox of x, y, width, height": lambda a: is_box(a["bbox"]) and min(a["bbox"][2:]) >= 0,
            "area, a number": lambda a: is_number(a["area"]),
            "iscrowd of 0 or 1": lambda a: a.get("iscrowd", 0) in (0, 1),
        },
    }
    for name in rules:
        source = f"the {name} in {path} are not in COCO's format"
        check_entries(source, content[name], rules[name])
    return data


def check_evaluable(data: dict, path: str | Path, masks: bool = False) -> None:
    """Checks that annotations, from the file ``path``, have all that pycocotools evaluates."""
    objects = data.get("annotations")
    if not objects:
        raise UserError(f"{path} has no annotations to compare detections with")
    rules = {"iscrowd": lambda a: "iscrowd" in a}
    if masks:
        sizes = {image["id"]: (image["height"], image["width"]) for image in data["images"]}
        rules["segmentation of polygons near its image or an RLE of its height and width"] = (
            lambda a: (
                _is_polygons(a["segmentation"], sizes[a["image_id"]])
                or is_mask(a["segmentation"], sizes[a["image_id"]])
            )
        )
    check_entries(f"the annotations in {path} cannot be evaluated", objects, rules)


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
    """Whether a value is an RLE, its runs listed or as a string, that fills a (height, width).

    With runs that do not fill the image, pycocotools loops forever when it compares two masks, and
    leaves the rest of a decoded one uninitialized; it has no check of its own.
    """
    if not isinstance(value, dict) or value.get("size") != list(size):
        return False
    runs = value.get("counts")
    if isinstance(runs, str):
        runs = run_lengths(runs)
    if not isinstance(runs, list) or not all(type(run) is int and run >= 0 for run in runs):
        return False
    return sum(runs) == size[0] * size[1]


#: What :func:`is_rle` checks, for :func:`check_entries`.
RLE = "segmentation, an RLE string of its image's height and width"


def is_rle(value, image: dict) -> bool:
    """Whether a value is an RLE string that fills an image, as result files have it."""
    size = (image["height"], image["width"])
    return is_mask(value, size) and isinstance(value["counts"], str)


def run_lengths(counts: str) -> list[int] | None:
    """Reads the runs of an RLE string; None if it is not valid.

    pycocotools' maskApi.c defines the format: groups of 5 bits as characters from 48 on, the lowest
    group first; bit 6 is set if another group follows, and the highest bit of the last group is the
    sign. From the fourth run on, a number is the difference to the run two places before.
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
