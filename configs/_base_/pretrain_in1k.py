# Pre-training on ImageNet-1K as in the paper, section 4.1: crops of 294x294 resized to 224x224, SGD
# from 0.1, divided by 10 every 40 of 100 epochs, batches of 256 (here 32 on each of eight GPUs).
# Everything else has mmpretrain's defaults: momentum, weight decay, flips, validation.
_base_ = [
    "mmpretrain::_base_/models/resnet50.py",
    "mmpretrain::_base_/datasets/imagenet_bs32.py",
    "mmpretrain::_base_/schedules/imagenet_bs256.py",
    "mmpretrain::_base_/default_runtime.py",
    "./exact_resume.py",
]

data_root = "data/imagenet/"
data_source = dict(
    data_root=data_root,
    advice="get ImageNet-1K from https://image-net.org and put its classes' folders there",
)

model = dict(
    backbone=dict(
        # mmdet's backbone in mmpretrain's scope, so that the weights have the detector's keys.
        _delete_=True,
        type="mmdet.SoftPoolResNet",
        depth=50,
        out_indices=(3,),
        norm_eval=False,
    ),
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    # Smaller images are padded by reflection, a case that the paper leaves open.
    dict(type="RandomCrop", crop_size=294, pad_if_needed=True, padding_mode="reflect"),
    dict(type="Resize", scale=224),
    dict(type="RandomFlip", prob=0.5, direction="horizontal"),
    dict(type="PackInputs"),
]
train_dataloader = dict(dataset=dict(data_root=data_root, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader

param_scheduler = dict(milestones=[40, 80])
default_hooks = _base_.pop("exact_resume")
default_hooks.checkpoint.max_keep_ckpts = 3
