# RetinaNet with a SoftPool ResNet-18 on COCO, mmdet's 1x schedule (paper, section 4.6, Table 8).
_base_ = "./retinanet_r50_softpool.py"

model = dict(
    backbone=dict(
        depth=18,
        init_cfg=dict(checkpoint="https://download.pytorch.org/models/resnet18-f37072fd.pth"),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
