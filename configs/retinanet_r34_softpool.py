# RetinaNet with a SoftPool ResNet-34 on COCO, mmdet's 1x schedule (paper, section 4.6, Table 8).
_base_ = "./retinanet_r50_softpool.py"

model = dict(
    backbone=dict(
        depth=34,
        init_cfg=dict(checkpoint="https://download.pytorch.org/models/resnet34-b627a593.pth"),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
