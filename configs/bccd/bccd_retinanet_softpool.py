# A small RetinaNet on BCCD, 364 microscope photos of blood cells: real photos that a CPU learns
# from random weights. A pattern for a data set of your own, see docs/own_data.md.
_base_ = [
    "mmdet::_base_/models/retinanet_r50_fpn.py",
    "mmdet::_base_/default_runtime.py",
    "../_base_/exact_resume.py",
]

data_root = "data/bccd/"
# Where to find the data set in this folder, for the error message if it is missing.
data_source = dict(data_root=data_root, advice="get BCCD as docs/own_data.md says")

model = dict(
    backbone=dict(
        type="SoftPoolResNet",
        depth=18,
        base_channels=32,
        frozen_stages=-1,
        norm_eval=False,
        zero_init_residual=False,
        init_cfg=None,
    ),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=64, num_outs=4),
    bbox_head=dict(
        num_classes=3,
        in_channels=64,
        feat_channels=64,
        stacked_convs=2,
        # Anchors from 24 to 272 pixels: at 320 x 240, platelets have 19 and white cells 94.
        anchor_generator=dict(octave_base_scale=3, scales_per_octave=2, strides=[8, 16, 32, 64]),
    ),
)

dataset = dict(
    type="CocoDataset",
    data_root=data_root,
    metainfo=dict(classes=("Platelets", "RBC", "WBC")),
)
resize = dict(type="Resize", scale=(320, 240), keep_ratio=True)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    resize,
    dict(type="RandomFlip", prob=[0.3, 0.3], direction=["horizontal", "vertical"]),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    resize,
    dict(type="LoadAnnotations", with_bbox=True),
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    ),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        ann_file="annotations/instances_train.json",
        data_prefix=dict(img="train/"),
        pipeline=train_pipeline,
        **dataset,
    ),
)
# The val split is for choices, the test split for results.
val_dataloader = dict(
    batch_size=8,
    num_workers=1,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        ann_file="annotations/instances_val.json",
        data_prefix=dict(img="val/"),
        test_mode=True,
        pipeline=test_pipeline,
        **dataset,
    ),
)
test_dataloader = dict(
    batch_size=8,
    num_workers=1,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        ann_file="annotations/instances_test.json",
        data_prefix=dict(img="test/"),
        test_mode=True,
        pipeline=test_pipeline,
        **dataset,
    ),
)
val_evaluator = dict(
    type="CocoMetric", ann_file=data_root + "annotations/instances_val.json", metric="bbox"
)
test_evaluator = dict(
    type="CocoMetric", ann_file=data_root + "annotations/instances_test.json", metric="bbox"
)

train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=20, val_interval=5)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=2e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=10),
)
# Without an end, the second schedule ends with max_epochs.
param_scheduler = [
    dict(type="LinearLR", start_factor=0.05, by_epoch=False, begin=0, end=50),
    dict(
        type="CosineAnnealingLR", by_epoch=True, convert_to_iter_based=True, begin=2, eta_min=2e-5
    ),
]
default_hooks = _base_.pop("exact_resume")
default_hooks.checkpoint.max_keep_ckpts = 2
default_hooks.logger = dict(interval=10)
randomness = dict(seed=0)
