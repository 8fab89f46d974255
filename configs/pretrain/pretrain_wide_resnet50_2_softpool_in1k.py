# Wide ResNet-50-2 with SoftPool, pre-trained on ImageNet-1K (paper, section 4.1). mmpretrain's: the
# bottlenecks of mmdet's ResNet have a fixed expansion.
_base_ = "../_base_/pretrain_in1k.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="SoftPoolBackbone",
        backbone=dict(
            type="mmpretrain.ResNet", depth=50, stem_channels=64, base_channels=128, expansion=2
        ),
    ),
)
