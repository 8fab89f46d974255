# Mask R-CNN with a SoftPool ResNet-34 on COCO, mmdet's 1x schedule (paper, section 4.6, Table 8).
_base_ = [
    "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py",
    "./_base_/resnets.py",
    "./_base_/exact_resume.py",
]

model = _base_.pop("resnets")[34]
default_hooks = _base_.pop("exact_resume")
