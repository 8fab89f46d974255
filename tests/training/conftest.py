import gc
import itertools
import json
import random

import cv2
import numpy as np
import pytest
import torch
from mmdet.datasets import CocoDataset
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS
from torch import nn
from torch.utils.data import Dataset

from mmsoftpool._openmmlab import end_workers
from mmsoftpool.config import load_config
from mmsoftpool.hooks.resume import SeededBatches

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
        cv2.imwrite(str(tmp_path / split / "1.jpg"), np.zeros((32, 32, 3), np.uint8))
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(annotations))
    path = config_path("retinanet_r50_softpool")
    return load_config(path, dict(data_root=str(tmp_path)), str(tmp_path / "work"))


@MODELS.register_module()
class Toy(BaseModel):
    """A layer whose gradient depends on random numbers of Python, NumPy and torch."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4096)

    def forward(self, inputs, mode="tensor"):
        if mode == "loss":
            noise = random.random() + np.random.rand() + torch.rand(4096)
            return dict(loss=(self.layer(torch.stack(inputs)) * noise).pow(2).mean())
        return inputs


@DATASETS.register_module()
class ToyImages(Dataset):
    """Twelve images, augmented with the same three generators, and by each differently."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        augmented = torch.tensor([index, random.random(), np.random.rand(), torch.rand(1).item()])
        return dict(inputs=augmented)


@METRICS.register_module()
class ToyScore(BaseMetric):
    """The next of the given scores; None interrupts the run."""

    def __init__(self, scores):
        super().__init__()
        self.scores = iter(scores)

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        score = next(self.scores)
        if score is None:
            raise KeyboardInterrupt
        return dict(AP=score)


@pytest.fixture
def toy(tmp_path):
    """Makes the config of a run that takes a fraction of a second."""
    numbers = itertools.count()

    def make(work_dir, scores=(0.5,) * 9, **settings):
        # The workers of an interrupted run: as cyclic garbage, they would each take five seconds.
        for batches in [o for o in gc.get_objects() if type(o) is SeededBatches]:
            batches.iterator = None
            end_workers(batches.loader)
        loader = dict(dataset=dict(type="ToyImages"), batch_size=2, num_workers=0)
        cfg = Config(
            dict(
                model=dict(type="Toy"),
                train_dataloader=dict(loader, sampler=dict(type="DefaultSampler", shuffle=True)),
                val_dataloader=dict(loader, sampler=dict(type="DefaultSampler", shuffle=False)),
                val_evaluator=dict(type="ToyScore", scores=list(scores)),
                train_cfg=dict(by_epoch=True, max_epochs=3),
                val_cfg=dict(),
                optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.01, momentum=0.9)),
                default_hooks=Config.fromfile(config_path("_base_/exact_resume")).exact_resume,
                randomness=dict(seed=0),
                experiment_name=f"{tmp_path}-{next(numbers)}",  # mmengine has globals by this name
                work_dir=str(tmp_path / work_dir),
            )
        )
        cfg.default_hooks.checkpoint.max_keep_ckpts = 1
        if "train_cfg" in settings:
            cfg.train_cfg = settings.pop("train_cfg")
        cfg.merge_from_dict(settings)
        cfg.launcher = "none"
        return cfg

    return make
