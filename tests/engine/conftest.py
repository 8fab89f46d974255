import json

import pytest
from mmdet.datasets import CocoDataset

from mmsoftpool import engine

from ..common import config_path


@pytest.fixture
def cfg(tmp_path):
    """A COCO config whose data set, an image and an object a split, is in ``tmp_path``."""
    names = CocoDataset.METAINFO["classes"]
    box = dict(id=1, image_id=1, category_id=1, bbox=[0, 0, 9, 9], area=81, iscrowd=0)
    annotations = dict(
        images=[dict(id=1, file_name="1.jpg", height=32, width=32)],
        annotations=[dict(box, segmentation=[[0, 0, 9, 0, 9, 9]])],
        categories=[dict(id=i, name=name) for i, name in enumerate(names, 1)],
    )
    for split in ("train2017", "val2017"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "1.jpg").touch()
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(annotations))
    path = config_path("retinanet_r50_softpool")
    return engine.load_config(path, dict(data_root=str(tmp_path)), str(tmp_path / "work"))
