#!/usr/bin/env python
"""Draws a small synthetic detection data set in COCO format: textured shapes on textures.

It is for the demo and for tests: it needs no download, the same seed draws the same images, and a
small detector learns it on a CPU in minutes. Every object has a box and a polygon mask.

Example: python tools/make_shapes.py data/shapes
"""

import json
from pathlib import Path

import cv2
import numpy as np
from rich.progress import track

from mmsoftpool import cli
from mmsoftpool.errors import UserError
from mmsoftpool.files import read_json, write_text

CLASSES = ("disc", "square", "triangle", "star")
_LICENSE = "Public domain: drawn by mmsoftpool"


def _outline(name: str, size: float, angle: float) -> np.ndarray:
    """Returns the outline around the origin, in a circle of diameter ``size``, as (points, 2)."""
    points = {"disc": 40, "square": 4, "triangle": 3, "star": 10}[name]
    turns = 2 * np.pi * np.arange(points) / points + angle
    radius = np.full(points, size / 2)
    if name == "star":
        radius[1::2] *= 0.45
    return np.stack([np.cos(turns), np.sin(turns)], 1) * radius[:, None]


def _texture(rng: np.random.Generator, size: int, contrast: float) -> np.ndarray:
    """Draws a texture of mean 0, (size, size, 3): noise of two grain sizes and a grating."""
    texture = np.zeros((size, size, 3), np.float32)
    for cells, weight in ((4, 1.0), (size // 5, 0.5)):
        noise = rng.normal(size=(cells, cells, 3)).astype(np.float32)
        texture += weight * cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC)
    y, x = np.mgrid[:size, :size].astype(np.float32)
    angle, period = rng.uniform(0, np.pi), rng.uniform(5, 20)
    wave = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period)
    texture += rng.uniform(0, 1) * wave[..., None]
    return contrast * texture


def _draw(rng: np.random.Generator, size: int) -> tuple[np.ndarray, list[dict]]:
    """Draws an image.

    Returns:
        tuple: The image, (size, size, 3) uint8 in BGR, and its objects, each with ``category`` (an
        index of :data:`CLASSES`), ``polygon`` and ``area`` of the mask.
    """
    ground = rng.uniform(50, 200, size=3)
    image = ground + _texture(rng, size, contrast=18)
    taken = np.zeros((size, size), np.uint8)
    objects = []
    for _ in range(rng.integers(1, 6)):
        category = int(rng.integers(len(CLASSES)))
        for _ in range(20):  # attempts to find a place that hides no other object
            side = size * 2 ** rng.uniform(-3, -0.8)
            outline = _outline(CLASSES[category], side, rng.uniform(0, 2 * np.pi))
            low, high = -outline.min(0), size - 1 - outline.max(0)
            polygon = np.round(outline + rng.uniform(low, high)).astype(np.int32)
            mask = cv2.fillPoly(np.zeros_like(taken), [polygon], 1)
            if not (mask & cv2.dilate(taken, np.ones((5, 5), np.uint8))).any():
                break
        else:
            continue
        while True:  # a colour that differs from the background
            colour = rng.uniform(0, 255, size=3)
            if np.linalg.norm(colour - ground) > 90:
                break
        image = np.where(mask[..., None], colour + _texture(rng, size, contrast=10), image)
        taken |= mask
        objects.append(dict(category=category, polygon=polygon, area=int(mask.sum())))
    image = cv2.GaussianBlur(image, (3, 3), 0) + rng.normal(scale=4, size=image.shape)
    return image.clip(0, 255).astype(np.uint8), objects


def _has_info(ann_file: Path, info: dict) -> bool:
    try:
        data = read_json(ann_file, "annotation file")
    except (FileNotFoundError, ValueError):
        return False  # missing or damaged
    return isinstance(data, dict) and data.get("info") == info


def make_shapes(root, train: int = 800, val: int = 100, size: int = 160, seed: int = 0) -> None:
    """Draws the data set into a folder, in the layout of COCO.

    The annotations are in ``root/annotations/instances_{train,val}.json``, the images in
    ``root/{train,val}/``. Image i of a split depends only on ``seed``, the split and i. A complete
    split with the same parameters is kept; an incomplete one is drawn again.

    Args:
        root (str | Path): The folder; it is created if it does not exist.
        train (int): Number of training images. Defaults to 800.
        val (int): Number of validation images. Defaults to 100.
        size (int): Height and width of the images in pixels, at least 64. Defaults to 160.
        seed (int): Seed of the random numbers, at least 0. Defaults to 0.

    Raises:
        UserError: If a number is too small.
        OSError: If a file cannot be written.
    """
    for name, value, minimum in (
        ("train", train, 1),
        ("val", val, 1),
        ("size", size, 64),
        ("seed", seed, 0),
    ):
        if value < minimum:
            raise UserError(f"{name} must be at least {minimum}, got {value}")
    root = Path(root)
    for number, (split, count) in enumerate((("train", train), ("val", val))):
        info = dict(
            description=f"mmsoftpool shapes, {split}: {count} images, {size} px, seed {seed}"
        )
        ann_file = root / "annotations" / f"instances_{split}.json"
        if _has_info(ann_file, info):
            print(f"{root}: the {split} split is complete")
            continue
        (root / split).mkdir(parents=True, exist_ok=True)
        ann_file.parent.mkdir(parents=True, exist_ok=True)
        images, annotations = [], []
        for i in track(range(count), description=f"drawing {root / split}"):
            image, objects = _draw(np.random.default_rng((seed, number, i)), size)
            file_name = f"{i:06d}.jpg"
            if not cv2.imwrite(
                str(root / split / file_name), image, [cv2.IMWRITE_JPEG_QUALITY, 95]
            ):
                raise OSError(f"cannot write {root / split / file_name}")
            images.append(dict(id=i, file_name=file_name, height=size, width=size, license=1))
            for shape in objects:
                polygon = shape["polygon"]
                x, y, w, h = cv2.boundingRect(polygon)
                annotations.append(
                    dict(
                        id=len(annotations) + 1,
                        image_id=i,
                        category_id=shape["category"] + 1,
                        bbox=[x, y, w, h],
                        area=shape["area"],
                        segmentation=[polygon.ravel().tolist()],
                        iscrowd=0,
                    )
                )
        data = dict(
            info=info,
            licenses=[dict(id=1, name=_LICENSE)],
            images=images,
            annotations=annotations,
            categories=[dict(id=i + 1, name=name) for i, name in enumerate(CLASSES)],
        )
        # Written last: this file marks its split as complete.
        write_text(ann_file, json.dumps(data))


def make_parser():
    parser = cli.make_parser(__doc__)
    parser.add_argument("root", help="the folder for the data set")
    for name, default, help in (
        ("train", 800, "the number of training images"),
        ("val", 100, "the number of validation images"),
        ("size", 160, "the height and width of the images in pixels, at least 64"),
        ("seed", 0, "the seed; the same seed draws the same images"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{help} (default: {default})"
        )
    return parser


def main(args):
    make_shapes(**vars(args))


if __name__ == "__main__":
    cli.run(main, make_parser().parse_args())
