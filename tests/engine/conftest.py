import json

import pytest

from mmsoftpool import engine

from ..common import config_path


@pytest.fixture
def cfg(tmp_path):
    """A COCO config whose data set, with empty annotations and images, is in ``tmp_path``."""
    for split in ("train2017", "val2017"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "1.jpg").touch()
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps({}))
    path = config_path("retinanet_r50_softpool")
    return engine.load_config(path, dict(data_root=str(tmp_path)), str(tmp_path / "work"))
