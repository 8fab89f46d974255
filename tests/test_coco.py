"""Annotation files: what is checked before pycocotools sees them."""

import pytest

from mmsoftpool import coco


@pytest.mark.parametrize("far", [1e30, -1e30, 201, -101])
def test_polygons_far_from_their_image_are_refused(far):
    """pycocotools takes memory for every pixel of an outline."""
    image = dict(id=1, file_name="1.jpg", height=50, width=100)
    polygon = [0, 0, 100, 0, 100, 50.0]
    data = dict(images=[image], annotations=[dict(id=1, image_id=1, iscrowd=0)])
    data["annotations"][0]["segmentation"] = [polygon]
    coco.check_evaluable(data, "val.json", masks=True)
    data["annotations"][0]["segmentation"] = [polygon, [far, *polygon[1:]]]
    with pytest.raises(ValueError, match="segmentation of polygons near its image or"):
        coco.check_evaluable(data, "val.json", masks=True)
