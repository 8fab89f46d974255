# RetinaNet with a SoftPool ResNet-101 on COCO, mmdet's 1x schedule (paper, section 4.6, Table 8).
_base_ = "./retinanet_r50_softpool.py"

model = dict(
    backbone=dict(
        depth=101,
        init_cfg=dict(checkpoint="https://download.pytorch.org/models/resnet101-63fe2227.pth"),
    ),
)
